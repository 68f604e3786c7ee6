"""The model card: what a folder for transformers says of itself to people."""

from __future__ import annotations

from stlm.export.origin import Origin
from stlm.stlm import STLM


def model_card(model: STLM, origin: Origin, architecture: str, native: bool) -> str:
    """README.md of the folder, in Markdown; what is not known of the model is left out.

    architecture: the class. native: whether transformers has it.
    """
    config, tokenizer = model.config, model.tokenizer
    table = sum(parameter.numel() for parameter in model.embedder.parameters())
    rows = {
        "architecture": architecture,
        "parameters": f"{model.num_parameters():,}, of which {table:,} read the ids",
        "context": f"{config.context_length:,} ids",
        "tokenizer": f"{tokenizer.spec}, {tokenizer.vocab_size:,} ids, sha256 {tokenizer.fingerprint}",
        "trained for": None if origin.step is None else f"{origin.step:,} steps",
        "data": None if origin.data_fingerprint is None else f"sha256 {origin.data_fingerprint}",
        "validation": None if origin.bits_per_byte is None else f"{origin.bits_per_byte:.4f} bits per byte",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    command = f"\nTrained by:\n\n```bash\n{origin.command}\n```\n" if origin.command else ""
    trust = "" if native else ", trust_remote_code=True"
    return CARD.format(table="\n".join(lines), command=command, trust=trust, note="" if native else NOTE)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# A super tiny language model

| | |
|---|---|
{table}
{command}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})
model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
ids = tokenizer("The file", return_tensors="pt")["input_ids"]
print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0], skip_special_tokens=True))
```

The tokenizer puts two symbols before a text: where a sequence begins, and where a document does.
{note}"""

NOTE = """
The code of the model lies beside it and needs torch and transformers alone: `trust_remote_code=True` runs it.
"""
