import json
import re

import pytest

from data_pipeline.tokenizers import train_sentencepiece
from stlm.export.comparison import sample_text
from stlm.export.huggingface.fast_tokenizer import definition_of

PROSE = re.sub(r"[^a-zA-Z ,.\n]", "", sample_text())  # without digits, and with no character of "<0x41>" but a letter
SPELLED = "<0x41> <0xD0><0x9F> <start>a<pad>, <unknown> 4 <4> <0x4> <<0x41>>"


@pytest.mark.parametrize("learned_from", [PROSE, PROSE + " <0 <0 <0 <st <st <st" * 50])
@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-bpe"])
def test_unknown_characters_become_bytes_and_spelled_bytes_stay_text(kind, learned_from, tmp_path):
    from tokenizers import Tokenizer

    tokenizer = train_sentencepiece([learned_from], 500, kind)
    there = Tokenizer.from_str(json.dumps(definition_of(tokenizer, tmp_path)))
    there.encode_special_tokens = True  # symbols in a text, such as "<start>", are encoded as spelled
    for text in (sample_text(), SPELLED):
        assert there.encode(text, add_special_tokens=False).ids == tokenizer.encode(text).tolist()
