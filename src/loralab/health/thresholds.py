"""Every limit that a rule judges by, with where it comes from.

Set on the 102 healthy runs of benchmarks/faults/development.yaml and frozen on 2026-11-20, before
any run of the unseen set was judged: who moves one moves the table of docs/faults.md. "Reckoned"
means argued, where no healthy development run gives the quantity.

Units: nats a token for losses, entropy and KL; shares from 0 to 1; steps and readings are counts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """value: what is compared with. evidence: why this and no other.

    healthy: the worst that healthy development runs came to where the rule's other conditions held,
    or the worst of all where these never did (so that it may be beyond a limit that is one of
    several); None: no run measured it.
    """

    value: float
    evidence: str
    healthy: float | None = None


_RECKONED = "reckoned: "


START_KL = Limit(
    0.02,
    "zero B, orthogonal, PiSSA and small factors start at rounding (bf16: about 1e-3)",
    healthy=0.000199,
)
START_KL_BROKEN = Limit(
    0.3, "both factors random gave KL 4.0 on a toy model (DESIGN, fact 5)", healthy=0.000199
)
START_LOSS = Limit(0.3, "beside direct evidence; a start that is the base has no gap", healthy=1.5)
START_LOSS_BROKEN = Limit(
    0.7, "without it: who goes on with an adapter of another style has a gap too", healthy=0.00288
)
BASE_SHARE = Limit(
    0.5,
    "a trained LoRA has about 0, a part of W that was not taken out of it 1 (the definition)",
    healthy=0.00544,
)
BASE_SHARE_MOST = Limit(1.5, "the same; a small dW along W has more", healthy=-0.351)
DEAD_SOME = Limit(
    0.0, "both factors zero: no gradient reaches either, whatever the data", healthy=0
)
DEAD_MOST = Limit(0.5, "as before, for most modules", healthy=0)
SCALING = Limit(0.01, "ln of the ratio; alpha / r is exact but for rounding", healthy=0)
RESCALED = Limit(
    0.3,
    _RECKONED
    + "nats on the rows that a scaled-down adapter gains over the base, while as it is it "
    "loses; one that was trained at its scaling does not lose",
)
MEMORY = Limit(1.0, _RECKONED + "what it is reckoned to need, of what is free")
LEFT_OUT = Limit(0.0, "a trainable tensor without an optimiser never moves", healthy=0)
STANDING_SOME = Limit(
    0.5, "A alone stands still for one step when B is 0; parts of a model may be unused", healthy=0
)
STANDING = Limit(0.9, "nothing healthy leaves nine tensors of ten as they are", healthy=0)
UNPREPARED = Limit(0.0, "a flag", healthy=0)


NOT_FINITE = Limit(0.0, "a count; skipped steps of fp16's loss scaling are not in it", healthy=0)
GRADIENT_ZERO_SOME = Limit(
    0.5, "GRPO's groups with equal rewards give single steps without gradient", healthy=0
)
GRADIENT_ZERO = Limit(0.99, "no step at all had a gradient", healthy=0)
LOSS_RISE = Limit(
    0.5, "of the first loss (at least 1 nat): batches of one row scatter by half of that", healthy=0
)
GRADIENT_SPIKE = Limit(30.0, "times the median so far; a warm-up stays under 10", healthy=6.6)
UPDATE_RATIO = Limit(
    0.3,
    "of the adapter's norm in a step; LoRA at 2e-4 with Adam moves about 0.005, a start with "
    "small factors 0.2 at first",
    healthy=0.209,
)
DELTA_RATIO = Limit(
    0.5, "||s BA|| / ||W||; healthy adapters of rank 1 to 64 stay under 0.2", healthy=0.419
)


DELTA_RATIO_BROKEN = Limit(3.0, "what is added is larger than what is there", healthy=0.419)


DOSE = Limit(
    1e-3,
    "sum of the learning rate; 2e-4 for 100 linear steps is 1e-2, 2e-6 is 1e-4; with Adam no "
    "entry of a factor moves further",
    healthy=0.001,
)
UNMOVED_KL = Limit(0.02, "healthy runs pass 0.05 within their first quarter", healthy=0)
LATE = Limit(0.25, "a share of the planned steps", healthy=1)
NO_SMOKE_TEST = Limit(
    10.0,
    "steps; a few of them are tried out, and learn little by right: 10 at 2e-4 are DOSE",
    healthy=240,
)
IDLE = Limit(0.999, "every dW is exactly zero: the adapter is the base", healthy=0)


DEGENERATE = Limit(
    0.5,
    "published repetition limits call 12 % of healthy code degenerate (DESIGN, fact 10)",
    healthy=0.167,
)
DEGENERATE_RISE = Limit(0.3, "over the base, which loops on some prompts itself", healthy=0.167)
DEGENERATE_RISE_SOME = Limit(
    0.25,
    "eight of 32 prompts more than the base; healthy runs of SmolLM2 have 2 of 12 more",
    healthy=0.167,
)
NEWLINES = Limit(0.5, "of characters; lists, JSON and code stay under 0.15", healthy=0.0495)
NEWLINES_RISE = Limit(0.3, "over the base on the same prompts", healthy=0.0901)
NEWLINES_SOME = Limit(0.3, "twice the most of healthy text", healthy=0.0495)
WHITESPACE = Limit(0.8, "deeply indented code stays under 0.5", healthy=0.293)
WHITESPACE_SOME = Limit(0.6, "as before", healthy=0.293)
ONE_TOKEN = Limit(0.5, "quotes of JSON and dashes of lists stay under 0.25", healthy=0.24)
ONE_TOKEN_SOME = Limit(0.35, "as before", healthy=0.24)
ONE_TOKEN_RISE = Limit(0.2, "over the base on the same prompts", healthy=0.149)
EMPTY = Limit(0.5, "a one-word answer has a visible character", healthy=0.167)
EMPTY_SOME = Limit(
    0.25, "eight of 32 prompts; one-word answers of SmolLM2 are empty on 2 of 12", healthy=0.167
)
FAILED = Limit(0.0, "logits that are no numbers", healthy=0)
GARBLED_OWN = Limit(
    5.0,
    "what a base thinks of text in capitals, in verse or in JSON is 1 to 3; of noise 8",
    healthy=2.84,
)
GARBLED_LOSS = Limit(1.5, "on known-good text, over the base", healthy=1.5)
LOSS_GAP = Limit(
    1.0, "beside another sign; who learned to answer in JSON or in one word passes it", healthy=1.5
)
LOSS_ALONE = Limit(
    2.0,
    "a warning by itself; rank 64 at 5e-4 on JSON alone, for 20 steps, costs SmolLM2 1.5",
    healthy=1.5,
)
ENTROPY_RISE = Limit(
    2.0, "training makes a model surer; 2 nats are seven times as many", healthy=0.585
)
ENTROPY_RISE_SOME = Limit(1.0, "as before", healthy=0.585)
SIMILAR = Limit(
    0.8, "answers to different prompts; JSON of one form stays under 0.6", healthy=0.0897
)
SIMILAR_SOME = Limit(0.6, "one-word answers reach it too, so a warning alone", healthy=0.0897)
SIMILAR_RISE = Limit(0.3, "over the base on the same prompts", healthy=0.0897)
LONG_ENOUGH = Limit(16.0, "tokens; classes and one-word answers are alike by right", healthy=43.5)
COPIED_RISE = Limit(0.3, "over the base", healthy=0)
CHARSET_RISE = Limit(0.3, "over the base; another language by choice, so a warning", healthy=0)


END_LOSS = Limit(4.0, "nats over the base: an end e^4 = 55 times as unlikely", healthy=0.654)
END_LOSS_SOME = Limit(1.5, "a task with longer answers moves it by less than 1", healthy=0.654)
ENDS_DROP = Limit(0.2, "of prompts that the base ends within the same length", healthy=0.0833)
LAYOUT_FALL = Limit(0.3, "whitespace got easier ...", healthy=-1.29)
CONTENT_RISE = Limit(0.3, "... while content got harder: the loss falls by layout", healthy=1.61)
PROMPT_GAIN = Limit(
    0.25, "of what the base gains from seeing the right prompt; a style keeps most", healthy=0.817
)
PROMPT_GAIN_SOME = Limit(0.5, "as before", healthy=0.802)
PROMPT_GAIN_BASE = Limit(0.2, "nats; below, the base has too little to lose", healthy=3.29)


LEARNED = Limit(
    -0.3,
    _RECKONED + "nats: the rows are this much likelier than to the base, or they are not learned",
)
ROWS_LEARNED = Limit(0.6, "of the base's loss on the rows is left: they are learned", healthy=0.108)
GAINS = Limit(3.0, _RECKONED + "standard errors by which it gains from the rows' own prompts")
CHANCE = Limit(2.0, "standard errors; random pairs pass it once in forty", healthy=-0.335)


TRACE = Limit(0.02, "of rows: what is wrong with fewer did not make the model what it is")
MASKED = Limit(0.5, "rows without a label teach nothing; half of them is no accident", healthy=0)
MASKED_SOME = Limit(0.02, "a few rows lose every label to max_length", healthy=0)
ENDLESS_ROWS = Limit(
    0.9, "answers without an end; text cut into blocks has none by right", healthy=0
)
PROMPTED = Limit(0.5, "rows whose prompt is masked: their answers have an end", healthy=1)
PAD_IS_END = Limit(0.5, "rows in which masking the padding masks the end", healthy=0)
MEMORISED_RISE = Limit(0.15, "nats on content, over the base, beside direct evidence", healthy=1.61)
PADDING = Limit(
    0.0, "of padding; a collator that masks leaves none, one that masks ids, text", healthy=0
)
DOUBLE_START = Limit(0.5, "rows", healthy=0)
LINE_BREAKS = Limit(0.5, "of learned tokens; code has 0.1 to 0.2, lists 0.15", healthy=0.156)
LINE_BREAKS_SOME = Limit(0.3, "as before", healthy=0.156)
BLANK = Limit(0.3, "rows; nobody asks for answers that cannot be seen", healthy=0)
BLANK_SOME = Limit(0.02, "rows; a few are an accident worth a look", healthy=0)
EXCESS = Limit(
    0.3,
    "share over what the base expects, healthy under 0.15; a class may come near",
    healthy=0.227,
)
OVEREXPECTED = Limit(
    0.15,
    "mean chance over its share, over the base's; who learns the rows gives each token its "
    "share, and the shares of 16 answers scatter by 0.03",
    healthy=0.0166,
)
OVEREXPECTED_SOME = Limit(0.08, "as before", healthy=0.0166)
SHUFFLED = Limit(0.35, "0.5 is chance, and what a base says that cannot tell", healthy=0.562)
SHUFFLED_LATE = Limit(0.5, _RECKONED + "of the training; form is learned before content")
TEMPLATE = Limit(
    0.5, "rows with marks of a chat template that this tokenizer does not have", healthy=0
)
TEMPLATE_SOME = Limit(0.0, "rows", healthy=0)
PASSES = Limit(8.0, "passes over the same rows; fine-tuning takes 1 to 3", healthy=7.5)
FEW_ROWS = Limit(256.0, "rows", healthy=256)
MEMORISED = Limit(0.2, "of the first loss is left", healthy=0.000368)
CUT_ROWS = Limit(0.5, "rows that lost their end to max_length")
CONTAMINATED = Limit(0.0, "rows that hold an evaluated one")
REPEATED_ROWS = Limit(0.5, "rows that are another's copy", healthy=0)


MERGE = Limit(
    0.01,
    "relative, fp32; healthy adapters merge to 1e-5, a wrong formula misses by 0.1",
    healthy=0.000921,
)
RELOAD = Limit(0.0, "a file keeps every bit", healthy=0)
KEYS = Limit(0.0, "a count", healthy=0)


SPLINE_START = Limit(
    0.01, "mean |v - k|: V0 of docs/lslora.md started at 0.125, the identity at 0", healthy=0
)
SPLINE_OUTSIDE = Limit(
    0.5, "share of inputs; the grid [-3, 3] leaves under 0.05 out", healthy=0.000375
)
SPLINE_REACH = Limit(
    1.5,
    "docs/lslora.md, V1 to V2: [-1, 1] for [-3, 3] costs nothing by itself, so a warning",
    healthy=3,
)
SPLINE_SCALE = Limit(
    0.3, "docs/lslora.md, V3 to V4: 0.1 for 1 costs 0.2 nats of held-out loss", healthy=0.996
)
SPLINE_PENALTY = Limit(
    1e-3, "docs/lslora.md, V5 to V6: 1e-4 for 0.01 costs nothing, so a warning", healthy=0.01
)
SPLINE_FLAG = Limit(
    0.0, "docs/lslora.md, V2 to V5: tanh and soft cost little, so a warning", healthy=0
)


CANARY = Limit(0.5, "of what gold answers earn; conciseness pays 0.96 for nothing", healthy=0.0602)
CANARY_SOME = Limit(
    0.25, "as before; Countdown's copied prompt earns 0.06 for its form", healthy=0.0602
)
ERRORS = Limit(3.0, "standard errors: once in 700 by chance", healthy=24.6)
GOLD_RIGHT = Limit(0.5, "gold answers are right by the definition", healthy=1)
IDENTITY = Limit(1e-6, "an adapter that changes nothing changes no metric", healthy=0)
BASELINE = Limit(0.05, "what a score is off that is worth a word, however sure", healthy=0.000262)
ONE_PROMPT = Limit(0.5, "share of prompts that differ; examples differ all", healthy=1)
LAST_ANSWER = Limit(-0.5, "most right answers after a wrong one do not count", healthy=0)
LAST_ANSWER_SOME = Limit(-1e-6, "the right answer after a wrong one is the answer", healthy=0)


TIES = Limit(0.9, "mean share of members with equal fitness, over five generations", healthy=0.537)
INFORMATIVE_SOME = Limit(0.2, "share of pairs whose two members differ in reward", healthy=0.912)
SAME_TEXTS = Limit(0.1, "share of members whose text is not the most frequent one", healthy=0.282)
MEMBER_KL = Limit(
    1e-3,
    "nats a token: over 48 tokens at most sqrt(48 KL / 2), 15 of 100 texts drawn, could "
    "differ (Pinsker's inequality); a healthy search of bench faults has 0.13, SmolLM2 in "
    "bf16 0.26 at the default fraction, and at a twentieth of it 0.002, most of it rounding",
    healthy=0.101,
)
MEMBER_KL_SOME = Limit(4e-3, "as before, 31 of 100 texts", healthy=0.101)
UNSOLVED = Limit(0.9, "share correct; where all is solved ties are right", healthy=0)
NO_OP = Limit(
    0.9,
    "of the perturbed entries, that the cast to the model's dtype leaves as they are",
    healthy=1.32e-06,
)
NO_OP_SOME = Limit(0.5, "as before", healthy=1.32e-06)
DOMINANCE = Limit(
    5.0,
    "noise over |W| of a module, times the median module's; one by granularity module",
    healthy=1,
)
DOMINANCE_SOME = Limit(3.0, "modules of a healthy layer differ by a factor of two", healthy=1)
GARBLED_MEMBERS = Limit(
    0.5, "share of members' texts that repeat, over the centre's", healthy=0.00313
)
GAP = Limit(3.0, "standard errors: training reward up while held-out reward is down", healthy=0.264)
REWARD_UP = Limit(3.0, "standard errors", healthy=18.2)
CORRECT_STANDS = Limit(1.0, "standard errors: answers are no righter than before", healthy=1.74)
SECOND_FALL = Limit(
    0.1, "share of answers; of many looks one is 3 errors off by chance", healthy=0.00313
)
UNEARNED = Limit(
    0.99, "of what gold answers earn: a text without merit earns all of it", healthy=0.0104
)
SECOND_DOWN = Limit(3.0, "standard errors by which the second measure fell", healthy=1.63)
