"""The model card of a folder for transformers."""

from __future__ import annotations

from typing import Any

from data_pipeline.plurals import number_of
from stlm.export.origin import Origin
from stlm.stlm import STLM

PROMPT, QUESTION, MOST = "The file", "Who are you?", 64


def model_card(model: STLM, origin: Origin, there: Any, tokenizer_there: Any, native: bool) -> str:
    """Return README.md of the folder; unknown facts are left out.

    there, tokenizer_there: model and tokenizer as loaded by transformers. native: whether transformers has the class.
    """
    config, tokenizer = model.config, model.tokenizer
    table = sum(parameter.numel() for parameter in model.embedder.parameters())
    rows = {
        "architecture": type(there).__name__,
        "parameters": f"{model.num_parameters():,}, of which {table:,} read the ids",
        "context": f"{config.context_length:,} ids",
        "tokenizer": f"{tokenizer.spec}, {tokenizer.vocab_size:,} ids, sha256 {tokenizer.fingerprint}",
        "trained for": None if origin.step is None else number_of(origin.step, "step"),
        "data": None if origin.data_fingerprint is None else f"sha256 {origin.data_fingerprint}",
        "validation": None if origin.bits_per_byte is None else f"{origin.bits_per_byte:.4f} bits per byte",
    }
    code = CHAT_SAMPLE if tokenizer.chat_template is not None else SAMPLE
    most = min(MOST, config.context_length // 2)
    return CARD.format(
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None),
        command=f"\nTrained by:\n\n```bash\n{origin.command}\n```\n" if origin.command else "",
        sample=code.format(trust="" if native else ", trust_remote_code=True", most=most),
        output=_written(there, tokenizer_there, tokenizer.chat_template is not None, most),
        template=CHAT_NOTE if tokenizer.chat_template is not None else "",
        licence="" if native else CODE_LICENCE,
    )


def _written(there: Any, tokenizer_there: Any, chat: bool, most: int) -> str:
    """Return the output of the sample code, as indented lines of text."""
    if chat:
        messages = [{"role": "user", "content": QUESTION}]
        given = tokenizer_there.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    else:
        given = tokenizer_there(PROMPT, return_tensors="pt")
    written = there.generate(**given, do_sample=False, max_new_tokens=most, tokenizer=tokenizer_there)[0]
    text = tokenizer_there.decode(written[given["input_ids"].size(1) if chat else 0 :], skip_special_tokens=True)
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

{licence}The licence of the weights is not stated here. It depends on the data that they were trained on; who publishes
them adds it to the first lines of this file, as `license: NAME`.
"""

SAMPLE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModelForCausalLM.from_pretrained("."{trust})
prompt = tokenizer("The file", return_tensors="pt")
text = model.generate(**prompt, do_sample=False, max_new_tokens={most}, tokenizer=tokenizer)[0]
print(tokenizer.decode(text, skip_special_tokens=True))
```
"""

CHAT_SAMPLE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModelForCausalLM.from_pretrained("."{trust})
messages = [{{"role": "user", "content": "Who are you?"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
text = model.generate(**prompt, do_sample=False, max_new_tokens={most}, tokenizer=tokenizer)[0]
print(tokenizer.decode(text[prompt["input_ids"].size(1) :], skip_special_tokens=True))
```
"""

CHAT_NOTE = """The chat template puts them before a conversation, and an answer ends where the model ends its turn.
"""

CODE_LICENCE = """The code of the model lies beside it, needs torch and transformers alone, and is under the MIT
licence (LICENSE); `trust_remote_code=True` runs it.

"""
