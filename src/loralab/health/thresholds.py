"""Every limit that a rule judges by, with where it comes from.

Limits are set on healthy development runs and then frozen: who moves one moves the table of
docs/faults.md. "Reckoned" means argued, and not yet seen to hold on development runs.

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


_RECKONED = "reckoned, not yet measured: "


START_KL = Limit(
    0.02,
    _RECKONED + "zero B, orthogonal, PiSSA and small factors start at rounding (bf16: about 1e-3)",
)
START_KL_BROKEN = Limit(
    0.3, _RECKONED + "both factors random gave KL 4.0 on a toy model (DESIGN, fact 5)"
)
START_LOSS = Limit(0.3, _RECKONED + "beside direct evidence; a start that is the base has no gap")
START_LOSS_BROKEN = Limit(
    0.7, _RECKONED + "without it: who goes on with an adapter of another style has a gap too"
)
BASE_SHARE = Limit(
    0.5, "a trained LoRA has about 0, a part of W that was not taken out of it 1 (the definition)"
)
BASE_SHARE_MOST = Limit(1.5, "the same; a small dW along W has more")
DEAD_SOME = Limit(0.0, "both factors zero: no gradient reaches either, whatever the data")
DEAD_MOST = Limit(0.5, "as before, for most modules")
SCALING = Limit(0.01, "ln of the ratio; alpha / r is exact but for rounding")
RESCALED = Limit(
    0.3,
    _RECKONED
    + "nats on the rows that a scaled-down adapter gains over the base, while as it is it "
    "loses; one that was trained at its scaling does not lose",
)
MEMORY = Limit(1.0, _RECKONED + "what it is reckoned to need, of what is free")
LEFT_OUT = Limit(0.0, "a trainable tensor without an optimiser never moves")
STANDING_SOME = Limit(
    0.5, _RECKONED + "A alone stands still for one step when B is 0; parts of a model may be unused"
)
STANDING = Limit(0.9, _RECKONED + "nothing healthy leaves nine tensors of ten as they are")
UNPREPARED = Limit(0.0, "a flag")


NOT_FINITE = Limit(0.0, "a count; skipped steps of fp16's loss scaling are not in it")
GRADIENT_ZERO_SOME = Limit(
    0.5, _RECKONED + "GRPO's groups with equal rewards give single steps without gradient"
)
GRADIENT_ZERO = Limit(0.99, _RECKONED + "no step at all had a gradient")
LOSS_RISE = Limit(
    0.5,
    _RECKONED + "of the first loss (at least 1 nat): batches of one row scatter by half of that",
)
GRADIENT_SPIKE = Limit(30.0, _RECKONED + "times the median so far; a warm-up stays under 10")
UPDATE_RATIO = Limit(
    0.1, _RECKONED + "of the adapter's norm in a step; LoRA at 2e-4 with Adam moves about 0.005"
)
DELTA_RATIO = Limit(
    0.5, _RECKONED + "||s BA|| / ||W||; healthy adapters of rank 1 to 64 stay under 0.2"
)


DELTA_RATIO_BROKEN = Limit(3.0, _RECKONED + "what is added is larger than what is there")


DOSE = Limit(
    1e-3,
    _RECKONED + "sum of the learning rate; 2e-4 for 100 linear steps is 1e-2, 2e-6 is 1e-4; with "
    "Adam no entry of a factor moves further",
)
UNMOVED_KL = Limit(0.02, _RECKONED + "healthy runs pass 0.05 within their first quarter")
LATE = Limit(0.25, "a share of the planned steps")
NO_SMOKE_TEST = Limit(20.0, "steps; a few of them are tried out, and learn little by right")
IDLE = Limit(0.999, "every dW is exactly zero: the adapter is the base")


DEGENERATE = Limit(
    0.5, "published repetition limits call 12 % of healthy code degenerate (DESIGN, fact 10)"
)
DEGENERATE_RISE = Limit(0.3, _RECKONED + "over the base, which loops on some prompts itself")
DEGENERATE_RISE_SOME = Limit(0.15, _RECKONED + "five of 32 prompts more than the base")
NEWLINES = Limit(0.5, _RECKONED + "of characters; lists, JSON and code stay under 0.15")
NEWLINES_RISE = Limit(0.3, _RECKONED + "over the base on the same prompts")
NEWLINES_SOME = Limit(0.3, _RECKONED + "twice the most of healthy text")
WHITESPACE = Limit(0.8, _RECKONED + "deeply indented code stays under 0.5")
WHITESPACE_SOME = Limit(0.6, _RECKONED + "as before")
ONE_TOKEN = Limit(0.5, _RECKONED + "quotes of JSON and dashes of lists stay under 0.25")
ONE_TOKEN_SOME = Limit(0.35, _RECKONED + "as before")
ONE_TOKEN_RISE = Limit(0.2, _RECKONED + "over the base on the same prompts")
EMPTY = Limit(0.5, _RECKONED + "a one-word answer has a visible character")
EMPTY_SOME = Limit(0.1, _RECKONED + "four of 32 prompts")
FAILED = Limit(0.0, "logits that are no numbers")
GARBLED_OWN = Limit(
    5.0,
    _RECKONED + "what a base thinks of text in capitals, in verse or in JSON is 1 to 3; of noise 8",
)
GARBLED_LOSS = Limit(1.5, _RECKONED + "on known-good text, over the base")
LOSS_GAP = Limit(
    1.0, _RECKONED + "a warning alone: a model that answers in one word expects an end everywhere"
)
ENTROPY_RISE = Limit(
    2.0, _RECKONED + "training makes a model surer; 2 nats are seven times as many"
)
ENTROPY_RISE_SOME = Limit(1.0, _RECKONED + "as before")
SIMILAR = Limit(0.8, _RECKONED + "answers to different prompts; JSON of one form stays under 0.6")
SIMILAR_SOME = Limit(0.6, _RECKONED + "one-word answers reach it too, so a warning alone")
SIMILAR_RISE = Limit(0.3, _RECKONED + "over the base on the same prompts")
LONG_ENOUGH = Limit(16.0, "tokens; classes and one-word answers are alike by right")
COPIED_RISE = Limit(0.3, _RECKONED + "over the base")
CHARSET_RISE = Limit(0.3, _RECKONED + "over the base; another language by choice, so a warning")


END_LOSS = Limit(4.0, _RECKONED + "nats over the base: an end e^4 = 55 times as unlikely")
END_LOSS_SOME = Limit(1.5, _RECKONED + "a task with longer answers moves it by less than 1")
ENDS_DROP = Limit(0.2, _RECKONED + "of prompts that the base ends within the same length")
LAYOUT_FALL = Limit(0.3, _RECKONED + "whitespace got easier ...")
CONTENT_RISE = Limit(0.3, _RECKONED + "... while content got harder: the loss falls by layout")
PROMPT_GAIN = Limit(
    0.25, _RECKONED + "of what the base gains from seeing the right prompt; a style keeps most"
)
PROMPT_GAIN_SOME = Limit(0.5, _RECKONED + "as before")
PROMPT_GAIN_BASE = Limit(0.2, _RECKONED + "nats; below, the base has too little to lose")


LEARNED = Limit(
    -0.3,
    _RECKONED + "nats: the rows are this much likelier than to the base, or they are not learned",
)
ROWS_LEARNED = Limit(0.6, _RECKONED + "of the base's loss on the rows is left: they are learned")
GAINS = Limit(3.0, _RECKONED + "standard errors by which it gains from the rows' own prompts")
CHANCE = Limit(2.0, _RECKONED + "standard errors; random pairs pass it once in forty")


TRACE = Limit(0.02, "of rows: what is wrong with fewer did not make the model what it is")
MASKED = Limit(0.5, "rows without a label teach nothing; half of them is no accident")
MASKED_SOME = Limit(0.02, _RECKONED + "a few rows lose every label to max_length")
ENDLESS_ROWS = Limit(0.9, "answers without an end; text cut into blocks has none by right")
PROMPTED = Limit(0.5, "rows whose prompt is masked: their answers have an end")
PAD_IS_END = Limit(0.5, "rows in which masking the padding masks the end")
MEMORISED_RISE = Limit(0.15, _RECKONED + "nats on content, over the base, beside direct evidence")
PADDING = Limit(0.0, "of padding; a collator that masks leaves none, one that masks ids, text")
DOUBLE_START = Limit(0.5, "rows")
LINE_BREAKS = Limit(0.5, _RECKONED + "of learned tokens; code has 0.1 to 0.2, lists 0.15")
LINE_BREAKS_SOME = Limit(0.3, _RECKONED + "as before")
BLANK = Limit(0.3, "rows; nobody asks for answers that cannot be seen")
BLANK_SOME = Limit(0.02, "rows; a few are an accident worth a look")
EXCESS = Limit(
    0.3, _RECKONED + "share over what the base expects, healthy under 0.15; a class may come near"
)
OVEREXPECTED = Limit(
    0.15,
    _RECKONED + "mean chance over its share, over the base's; who learns the rows gives each token "
    "its share, and the shares of 16 answers scatter by 0.03",
)
OVEREXPECTED_SOME = Limit(0.08, _RECKONED + "as before")
SHUFFLED = Limit(0.35, _RECKONED + "0.5 is chance, and what a base says that cannot tell")
SHUFFLED_LATE = Limit(0.5, _RECKONED + "of the training; form is learned before content")
TEMPLATE = Limit(0.5, "rows with marks of a chat template that this tokenizer does not have")
TEMPLATE_SOME = Limit(0.0, "rows")
PASSES = Limit(8.0, _RECKONED + "passes over the same rows; fine-tuning takes 1 to 3")
FEW_ROWS = Limit(256.0, _RECKONED + "rows")
MEMORISED = Limit(0.2, _RECKONED + "of the first loss is left")
CUT_ROWS = Limit(0.5, "rows that lost their end to max_length")
CONTAMINATED = Limit(0.0, "rows that hold an evaluated one")
REPEATED_ROWS = Limit(0.5, _RECKONED + "rows that are another's copy")


MERGE = Limit(0.01, "relative, fp32; healthy adapters merge to 1e-5, a wrong formula misses by 0.1")
RELOAD = Limit(0.0, "a file keeps every bit")
KEYS = Limit(0.0, "a count")


SPLINE_START = Limit(0.01, "mean |v - k|: V0 of docs/lslora.md started at 0.125, the identity at 0")
SPLINE_OUTSIDE = Limit(0.5, _RECKONED + "share of inputs; the grid [-3, 3] leaves under 0.05 out")
SPLINE_REACH = Limit(
    1.5, "docs/lslora.md, V1 to V2: [-1, 1] for [-3, 3] costs nothing by itself, so a warning"
)
SPLINE_SCALE = Limit(0.3, "docs/lslora.md, V3 to V4: 0.1 for 1 costs 0.2 nats of held-out loss")
SPLINE_PENALTY = Limit(1e-3, "docs/lslora.md, V5 to V6: 1e-4 for 0.01 costs nothing, so a warning")
SPLINE_FLAG = Limit(0.0, "docs/lslora.md, V2 to V5: tanh and soft cost little, so a warning")


CANARY = Limit(0.5, _RECKONED + "of what gold answers earn; conciseness pays 0.96 for nothing")
CANARY_SOME = Limit(
    0.25, _RECKONED + "as before; Countdown's copied prompt earns 0.06 for its form"
)
ERRORS = Limit(3.0, "standard errors: once in 700 by chance")
GOLD_RIGHT = Limit(0.5, "gold answers are right by the definition")
IDENTITY = Limit(1e-6, "an adapter that changes nothing changes no metric")
BASELINE = Limit(0.05, "what a score is off that is worth a word, however sure")
ONE_PROMPT = Limit(0.5, _RECKONED + "share of prompts that differ; examples differ all")
LAST_ANSWER = Limit(-0.5, "most right answers after a wrong one do not count")
LAST_ANSWER_SOME = Limit(-1e-6, "the right answer after a wrong one is the answer")


TIES = Limit(0.9, _RECKONED + "mean share of members with equal fitness, over five generations")
INFORMATIVE_SOME = Limit(0.2, _RECKONED + "share of pairs whose two members differ in reward")
SAME_TEXTS = Limit(0.1, _RECKONED + "share of members whose text is not the most frequent one")
MEMBER_KL = Limit(
    1e-3,
    "nats a token: over 48 tokens at most sqrt(48 KL / 2), 15 of 100 texts drawn, could differ "
    "(Pinsker's inequality); a healthy search of bench faults has 0.13, SmolLM2 in bf16 0.26 at "
    "the default fraction, and at a twentieth of it 0.002, most of it rounding",
)
MEMBER_KL_SOME = Limit(4e-3, "as before, 31 of 100 texts")
UNSOLVED = Limit(0.9, "share correct; where all is solved ties are right")
NO_OP = Limit(
    0.9, "of the perturbed entries, that the cast to the model's dtype leaves as they are"
)
NO_OP_SOME = Limit(0.5, "as before")
DOMINANCE = Limit(
    5.0,
    _RECKONED + "noise over |W| of a module, times the median module's; one by granularity module",
)
DOMINANCE_SOME = Limit(3.0, _RECKONED + "modules of a healthy layer differ by a factor of two")
GARBLED_MEMBERS = Limit(0.5, _RECKONED + "share of members' texts that repeat, over the centre's")
GAP = Limit(3.0, _RECKONED + "standard errors: training reward up while held-out reward is down")
REWARD_UP = Limit(3.0, _RECKONED + "standard errors")
CORRECT_STANDS = Limit(1.0, _RECKONED + "standard errors: answers are no righter than before")
SECOND_FALL = Limit(
    0.1, _RECKONED + "share of answers; of many looks one is 3 errors off by chance"
)
UNEARNED = Limit(0.99, "of what gold answers earn: a text without merit earns all of it")
SECOND_DOWN = Limit(3.0, _RECKONED + "standard errors by which the second measure fell")
