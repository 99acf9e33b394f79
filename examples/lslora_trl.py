"""Train an LS-LoRA adapter with TRL, save it, load it again: python examples/lslora_trl.py"""

import argparse

import torch
from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

import loralab
from loralab.adapters import LSLoraConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="smollm2, a directory or a hub name")
parser.add_argument("--output", default="lslora-adapter", help="where the adapter goes")
arguments = parser.parse_args()

model, tokenizer = loralab.load(arguments.model, dtype="float32")
cities = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo"}
rows = [{"prompt": f"The capital of {a} is", "completion": f" {b}."} for a, b in cities.items()]
settings = SFTConfig(arguments.output, max_steps=6, learning_rate=1e-3, bf16=False)
adapter = LSLoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
data = Dataset.from_list(rows)
trainer = SFTTrainer(model, settings, None, data, processing_class=tokenizer, peft_config=adapter)
trainer.train()
trainer.save_model()

tokens = tokenizer(rows[0]["prompt"], return_tensors="pt").input_ids
base, _ = loralab.load(arguments.model, dtype="float32")
loaded = PeftModel.from_pretrained(base, arguments.output).eval()
with torch.no_grad():
    difference = (trainer.model.eval()(tokens).logits - loaded(tokens).logits).abs().max().item()
assert difference == 0, f"the loaded adapter's logits differ by {difference}"
print(f"saved to {arguments.output} and loaded again: largest difference of logits {difference}")
