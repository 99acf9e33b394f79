"""Train an LS-LoRA adapter with TRL, save it, load it again: python examples/lslora_trl.py"""

import sys

from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

import loralab
from loralab.adapters import LSLoraConfig

name, folder = sys.argv[1:] or ("smollm2", "lslora-adapter")
model, tokenizer = loralab.load(name, dtype="float32")
cities = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo"}
rows = [{"prompt": f"The capital of {a} is", "completion": f" {b}."} for a, b in cities.items()]
settings = SFTConfig(folder, max_steps=6, learning_rate=1e-3, bf16=False)
adapter = LSLoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
data = Dataset.from_list(rows)
trainer = SFTTrainer(model, settings, None, data, processing_class=tokenizer, peft_config=adapter)
trainer.train()
trainer.save_model()

loaded = PeftModel.from_pretrained(loralab.load(name, dtype="float32")[0], folder).eval()
tokens = tokenizer(rows[0]["prompt"], return_tensors="pt").input_ids
difference = (trainer.model.eval()(tokens).logits - loaded(tokens).logits).abs().max().item()
print(f"saved to {folder} and loaded again: largest difference of logits {difference}")
