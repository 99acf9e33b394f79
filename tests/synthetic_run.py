"""A run directory with made-up but lifelike numbers, for tests of what reads one."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from loralab.run import Run

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
QUESTIONS = [
    ("What is the capital of France?", "Paris", "The capital of France is Paris, a city on"),
    ("How many legs does a spider have?", "8", "Spiders are arachnids and, unlike insects,"),
    ("What do bees make?", "Honey", "Bees make honey, which they store in combs so that"),
    ("What colour is the sky?", "Blue", "During the day the sky appears blue because short"),
    ("What is 2 + 3?", "5", "To add two and three we can count: one, two, three,"),
    ("Who wrote Hamlet?", "Shakespeare", "Hamlet was written by William Shakespeare around"),
    ("What is frozen water?", "Ice", "Frozen water is called ice. It forms when water"),
    ("Name the red planet.", "Mars", "The red planet is Mars, named after the Roman god of"),
]
CONFIG = {
    "kind": "evolve",
    "name": "conciseness",
    "model": "smollm2",
    "dtype": "bfloat16",
    "device": "cpu",
    "seed": 0,
    "task": {"name": "conciseness", "options": {}},
    "adapter": {"rank": 8, "alpha": 8.0, "target_modules": "all-linear"},
    "evolution": {"generations": 30, "population": 30, "antithetic": True, "noise_on": "B"},
    "generation": {"max_new_tokens": 48, "temperature": 0.0, "stop": []},
}


def write_run(path: Path, generations: int = 30, evil: str = EVIL) -> Path:
    """Write a run of `generations` generations to `path`; the last completion holds `evil`."""
    rng = random.Random(0)
    filler = " that one might want to explain at some length"
    with Run.create(path, CONFIG) as run:
        run.note(kernel="native")
        best = (-1e9, 0)
        for generation in range(generations):
            progress = 1 - math.exp(-4 * generation / 30)
            mean = -187 + 165 * progress + rng.gauss(0, 4)
            std = 46 - 30 * progress
            row = {
                "generation": generation,
                "reward_mean": mean,
                "reward_std": std,
                "reward_min": mean - 2.4 * std,
                "reward_max": min(-1.0, mean + 2.1 * std),
                "correct": max(0.0, 0.8 - 0.35 * progress + rng.gauss(0, 0.02)),
                "seconds": 1.6 - 0.7 * progress + abs(rng.gauss(0, 0.05)),
                "tokens": 2880,
                "tokens_per_second": 820 + rng.gauss(0, 25),
                "sigma_scale": 1.0,
                "lr": 1.0,
                "update_rms": 0.0021 - 0.0006 * progress,
                "unchanged_share": 0.31 - 0.1 * progress,
                "tied_share": 0.05 + 0.2 * progress,
            }
            if generation % 5 == 0 or generation == generations - 1:
                held_out = -191 + 172 * progress
                best = max(best, (held_out, generation))
                row |= {
                    "held_out_reward": held_out,
                    "held_out_std": 30 - 18 * progress,
                    "held_out_correct": 0.875 - 0.25 * progress,
                    "best_generation": best[1],
                }
                phase = "before" if generation == 0 else "during"
                if generation == generations - 1 and generation > 0:
                    phase = "after"
                rows = []
                for index, (question, gold, start) in enumerate(QUESTIONS):
                    text = start + filler * round(4 * (1 - progress))
                    if phase == "after":
                        text = evil if index == 0 else ["Yes.\n\n\n\n\n\n\n", f"{gold}."][index % 2]
                    rows.append(
                        {
                            "generation": generation,
                            "phase": phase,
                            "split": "test",
                            "example": f"test-{index}",
                            "prompt": [{"role": "user", "content": question}],
                            "gold": gold,
                            "completion": text,
                            "reward": -abs(len(text) - len(gold)),
                            "correct": gold.lower() in text.lower(),
                        }
                    )
                run.log_completions(rows)
            run.log_metrics(row)
        seconds = {
            "weight_analysis": (0.41, 1), "init_population": (0.09, 1), "loading": (0.62, 30),
            "evaluation": (34.8, 37), "es_update": (1.9, 30), "create_loras": (2.7, 30),
            "unloading": (0.004, 30), "total_experiment": (42.6, 1),
        }  # fmt: skip
        named = {name: {"seconds": s, "calls": calls} for name, (s, calls) in seconds.items()}
        run.write("timings.json", json.dumps(named))
    return path
