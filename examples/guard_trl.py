"""A plain TRL script with one line added: `callbacks=[GuardCallback()]`.

    python examples/guard_trl.py                     SmolLM2-135M-Instruct, 30 steps, healthy
    python examples/guard_trl.py --break             the same with a learning rate 100 times as high
    python examples/guard_trl.py --break --action rollback

Before the first step, after steps 1, 5, 10, 25 and 50, then every n and at the end the guard asks
the model twelve prompts, compares what it does with the model without its adapter, and says what is
wrong. `readings.jsonl` and `findings.jsonl` lie in the output directory. Of loralab the guard is
used, and `load`, which has SmolLM2 from the package index: a model of
AutoModelForCausalLM.from_pretrained does as well.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import loralab
from loralab.health import GuardCallback

COUNTRIES = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Norway": "Oslo",
    "Egypt": "Cairo",
    "Japan": "Tokyo",
    "Peru": "Lima",
    "Kenya": "Nairobi",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="what loralab.load takes")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--break", dest="broken", action="store_true")
    parser.add_argument("--action", default="warn", choices=["warn", "stop", "rollback"])
    parser.add_argument("--output", default="guard-trl")
    options = parser.parse_args()

    model, tokenizer = loralab.load(options.model)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is the capital of {country}?"}],
            "completion": [{"role": "assistant", "content": f"The capital is {city}."}],
        }
        for country, city in COUNTRIES.items()
    ]
    guard = GuardCallback(action=options.action)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=2e-2 if options.broken else 2e-4,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        callbacks=[guard],  # the line
    )
    trainer.train()
    print(f"the guard's verdict: {guard.verdict}; looking took {guard.seconds:.0f} s")
    for finding in guard.findings:
        print(f"  {finding.severity} at step {finding.step}: {finding.rule}")
    if guard.causes:
        print("likeliest causes:", ", ".join(guard.causes[:2]))


if __name__ == "__main__":
    main()
