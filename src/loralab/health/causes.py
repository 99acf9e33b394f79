"""Why an adapter is broken: the causes there are, and how to mend each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Evidence = Literal["direct", "typical", "symptom"]
"""direct: the fault itself is seen (a masked row, a missing key). typical: what this fault does
and few others do. symptom: what many faults do."""

CAUSES: Mapping[str, str] = {
    "init.garbled": "the adapter changes the model before the first step",
    "init.zero_factors": "both factors are zero, so no gradient reaches either",
    "init.residual_missing": "a part of W went into the adapter and was not taken out of W",
    "init.unprepared": "a start that has to be prepared with data was not",
    "scale.wrong": "the adapter's scaling is not the one it was made for",
    "optimiser.adapter_left_out": "the optimiser does not hold the adapter's tensors",
    "spline.not_identity": "the splines do not start at the identity",
    "spline.grid_too_narrow": "most inputs of the splines fall outside their grid",
    "spline.tanh": "a tanh squashes what goes into the splines",
    "spline.output_scale": "the splines' output starts far below 1",
    "spline.soft": "soft interpolation is not the identity at the start",
    "spline.penalty_off": "the splines' penalty is too small to hold them",
    "lr.too_high": "the learning rate is too high",
    "lr.too_low": "the learning rate is too low to move the adapter",
    "numbers.nan": "a step made numbers that are not finite",
    "data.newlines": "the targets are mostly line breaks",
    "data.overweighted_token": "one token counts far more than the others",
    "data.eos_masked": "the end token is not learned",
    "data.all_masked": "rows have no label",
    "data.shuffled": "answers stand under the wrong prompts",
    "data.too_few": "few rows are learned by heart",
    "data.empty": "the targets are empty",
    "data.padding_learned": "padding is learned as if it were text",
    "data.double_bos": "rows start with the first token twice",
    "data.truncated": "rows lose their end to the length limit",
    "data.contaminated": "training rows hold evaluated ones",
    "data.duplicates": "many rows are copies",
    "template.wrong": "rows are in another chat template than the tokenizer's",
    "merge.unequal": "the merged model is not the adapter's",
    "save.keys_dropped": "tensors of the adapter are missing from its file",
    "evaluation.reads_context": "the evaluation asks another question than the examples",
    "evaluation.first_match": "the evaluation takes the first answer instead of the last",
    "evaluation.baseline": "the baseline was not measured as the adapter is",
    "reward.exploitable": "the score can be had without solving the task",
    "es.noise_too_weak": "the noise is too weak to change what members write",
    "es.outlier_sigma": "one module out of proportion sets the noise of others",
    "es.noise_too_strong": "the noise breaks the members",
    "es.overfit": "the search fits its training prompts",
    "file.corrupt": "the file is damaged",
    "file.wrong_base": "the adapter was made for another base model",
    "memory.short": "the run needs more memory than there is",
    "collapse.mode": "the model gives every prompt much the same answer",
}
"""Id to one line for people."""

MENDS: Mapping[str, str] = {
    "init.garbled": "start at the base: zero B (init_lora_weights=True), or a start that is taken "
    "out of W; never train from two random factors",
    "init.zero_factors": "give one factor random values: lora_A by init_lora_weights=True",
    "init.residual_missing": "subtract s B A from W, as init_lora_weights='pissa' on the base or "
    "loralab.adapters.initialize(model, 'pissa') does",
    "init.unprepared": "run the preparation first: initialize_lora_eva_weights, "
    "preprocess_loraga, or loralab.adapters.initialize",
    "scale.wrong": "set lora_alpha so that alpha / r (alpha / sqrt r with rslora) is the scaling "
    "meant, and change neither after training",
    "optimiser.adapter_left_out": "make the optimiser after the adapter is attached, from "
    "model.parameters() that require a gradient",
    "spline.not_identity": "start with spline_init='identity', output_scale_init=1, "
    "normalize='none'",
    "spline.grid_too_narrow": "widen k_min and k_max to cover the inputs (default -3, 3), with "
    "boundary='extrapolate'",
    "spline.tanh": "set normalize='none'",
    "spline.output_scale": "set output_scale_init=1",
    "spline.soft": "set interpolation_method='piecewise'",
    "spline.penalty_off": "set spline_reg_weight=0.01",
    "lr.too_high": "start again from before the damage with a tenth of the learning rate, some "
    "warm-up and max_grad_norm=1",
    "lr.too_low": "raise the learning rate (LoRA with Adam: 1e-4 to 2e-4) or train for longer",
    "numbers.nan": "lower the learning rate, lengthen the warm-up, set max_grad_norm=1, and look "
    "for rows without labels",
    "data.newlines": "strip the targets and look at them with `loralab data check`; weigh "
    "whitespace as any other token",
    "data.overweighted_token": "take the token's weight out of the loss, and look at the targets "
    "with `loralab data check`",
    "data.eos_masked": "end each target with the end token and let its label stand; pad with "
    "another token than it, or mask by length",
    "data.all_masked": "look at what masks the labels: the response template, or a max_length "
    "shorter than the prompts",
    "data.shuffled": "check that prompt and answer come from the same row",
    "data.too_few": "stop earlier, train on more rows, or lower rank and learning rate",
    "data.empty": "leave out rows with empty targets",
    "data.padding_learned": "have the collator label padding -100, by length or attention mask",
    "data.double_bos": "tokenize text that a chat template made with add_special_tokens=False",
    "data.truncated": "raise max_length, or leave the long rows out",
    "data.contaminated": "leave these rows out: contamination: {action: drop}",
    "data.duplicates": "drop copies: `loralab data check` names them",
    "template.wrong": "make rows with the tokenizer's own apply_chat_template",
    "merge.unequal": "keep the adapter unmerged; a nonlinear one has no exact merge on activations",
    "save.keys_dropped": "save every tensor of the adapter (splines too) with save_pretrained, "
    "and load it again before the run is called done",
    "evaluation.reads_context": "read the prompt from the examples' own prompt field",
    "evaluation.first_match": "take the last answer of a completion, not the first",
    "evaluation.baseline": "measure the base with the same prompts, sampling and extraction",
    "reward.exploitable": "give no reward to text without an answer, and watch a second measure",
    "es.noise_too_weak": "raise evolution.scale.fraction (default 0.1), or the population",
    "es.outlier_sigma": "set evolution.scale.granularity: module",
    "es.noise_too_strong": "lower evolution.scale.fraction",
    "es.overfit": "give each generation more prompts, and keep the best by held-out score",
    "file.corrupt": "make the file anew or copy it again",
    "file.wrong_base": "load it onto the model named in base_model_name_or_path",
    "memory.short": "a smaller batch_size or max_length, gradient_checkpointing, or quantization",
    "collapse.mode": "check that prompts reach the model and that answers differ; lower the "
    "learning rate",
}
"""Id to what to do."""
