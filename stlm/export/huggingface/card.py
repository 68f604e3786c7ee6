"""The model card of a folder for transformers."""

from __future__ import annotations

from typing import Any

from data_pipeline.plurals import number_of
from stlm.export.origin import Origin
from stlm.stlm import STLM

PROMPT, QUESTION, MAX_NEW_TOKENS = "The file", "Who are you?", 64


def model_card(model: STLM, origin: Origin, exported: Any, exported_tokenizer: Any, native: bool) -> str:
    """Return README.md of the folder; unknown facts are left out.

    `exported`, `exported_tokenizer`: as loaded by transformers. `native`: whether transformers has the model's class.
    """
    config, tokenizer = model.config, model.tokenizer
    table = sum(parameter.numel() for parameter in model.embedder.parameters())
    rows = {
        "architecture": type(exported).__name__,
        "parameters": f"{model.num_parameters():,}, of which {table:,} in the embedder",
        "context": f"{config.context_length:,} ids",
        "tokenizer": f"{tokenizer.spec}, {tokenizer.vocab_size:,} ids, sha256 {tokenizer.fingerprint}",
        "trained for": None if origin.step is None else number_of(origin.step, "step"),
        "data": None if origin.data_fingerprint is None else f"sha256 {origin.data_fingerprint}",
        "validation": None if origin.bits_per_byte is None else f"{origin.bits_per_byte:.4f} bits per byte",
    }
    code = CHAT_SAMPLE if tokenizer.chat_template is not None else SAMPLE
    max_new_tokens = min(MAX_NEW_TOKENS, config.context_length // 2)
    return CARD.format(
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None),
        command=f"\nTrained by:\n\n```bash\n{origin.command}\n```\n" if origin.command else "",
        sample=code.format(trust="" if native else ", trust_remote_code=True", max_new_tokens=max_new_tokens),
        output=_sample_output(exported, exported_tokenizer, tokenizer.chat_template is not None, max_new_tokens),
        template=CHAT_NOTE if tokenizer.chat_template is not None else "",
        licence="" if native else CODE_LICENCE,
    )


def _sample_output(exported: Any, exported_tokenizer: Any, chat: bool, max_new_tokens: int) -> str:
    """Return the output of the sample code, as indented lines of text."""
    if chat:
        messages = [{"role": "user", "content": QUESTION}]
        given = exported_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    else:
        given = exported_tokenizer(PROMPT, return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "tokenizer": exported_tokenizer}
    written = exported.generate(**given, **options)[0]
    text = exported_tokenizer.decode(written[given["input_ids"].size(1) if chat else 0 :], skip_special_tokens=True)
    return "\n".join(f"    {line}" for line in _printable(text).splitlines())


def _printable(text: str) -> str:
    """Return the text with control characters replaced by the Unicode replacement character."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# A super tiny language model

| | |
|---|---|
{table}
{command}
In this folder:

{sample}
This prints:

{output}

The tokenizer puts two symbols before a text: where a sequence begins, and where a document does.
{template}
## Licence

{licence}The licence of the weights is not stated here, as it depends on the training data.
If you publish them, add it to the first lines of this file, as `license: NAME`.
"""

SAMPLE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModelForCausalLM.from_pretrained("."{trust})
prompt = tokenizer("The file", return_tensors="pt")
text = model.generate(**prompt, do_sample=False, max_new_tokens={max_new_tokens}, tokenizer=tokenizer)[0]
print(tokenizer.decode(text, skip_special_tokens=True))
```
"""

CHAT_SAMPLE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModelForCausalLM.from_pretrained("."{trust})
messages = [{{"role": "user", "content": "Who are you?"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
text = model.generate(**prompt, do_sample=False, max_new_tokens={max_new_tokens}, tokenizer=tokenizer)[0]
print(tokenizer.decode(text[prompt["input_ids"].size(1) :], skip_special_tokens=True))
```
"""

CHAT_NOTE = """The chat template puts them before a conversation, and an answer ends where the model ends its turn.
"""

CODE_LICENCE = """The model's code is part of this folder, needs only torch and transformers, and is under the
MIT licence (LICENSE); `trust_remote_code=True` runs it.

"""
