"""Token ids against open_clip's on any text, and against transformers' wherever the two agree."""

import functools
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import peers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minildm.tokenizer import BEGIN, END, Tokenizer, _byte_pair_encoder, vocabulary_files

AWKWARD = [
    "",
    " ",
    "\t\n\r ",
    "a",
    "A",
    "chest x-ray",
    "chest x-ray, age 47 male, view PA, projection PA, modality DX, "
    "diagnosis calcified granuloma, loc right upper lobe",
    "CHEST X-RAY",
    "  chest   x-ray\n\nPA\t",
    "x" * 60,
    "1234567890",
    "3.5mm",
    "T1/T2",
    "90%",
    "[XXXX] XXXX",
    "it's the patient's",
    "don't, won't, I'll, we've, he'd, I'm, they're",
    "e-mail: a.b@c.de",
    "a_b__c",
    "#hash @at $5 \\back /slash",
    "!!!??...",
    "(parenthesis) {brace} <angle>",
    "-",
    "---",
    "naïve façade Ångström",
    "épanchement pleural",
    "Lungenödem",
    "胸部X線写真",
    "рентген грудной клетки",
    "صورة أشعة",
    "צילום חזה",
    "छाती का एक्स-रे",
    "흉부 엑스레이",
    "😀🫁",
    "👩‍⚕️",
    "αβγ ΔΩ µm",
    "10⁵ H₂O ½",
    "№ § ¶ † ‡",
    "a | b",
    "&",
    "a&b",
    "tab\there",
    "\u00a0nbsp\u00a0",
    "zero\u200bwidth",
    "e\u0301 combining",
    "İstanbul",
    "ẞ STRASSE",
    "\U0001f9ec\U0001f9a0",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]
# Texts that open_clip's cleaning changes and transformers' does not.
REPAIRED = {
    "curly quotes": "the patient\u2019s \u201cright\u201d lung",
    "ligature": "in\ufb01ltrate",
    "entity": "lung &amp; heart &lt;left&gt;",
    "literal end of text": "a <|endoftext|> b",
    "literal start of text": "a <|startoftext|> b",
    "control character": "null\x00",
    "byte order mark": "\ufeffchest",
    "capital sigma that ends a word": "ΣΑΣ",
}


@functools.cache
def transformers_tokenizer():
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        peers.write_tokenizer(Path(folder))
        return CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=77)


def by_transformers(prompts, pad_token_id=END):
    out = transformers_tokenizer()(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    token_ids = out.input_ids
    return token_ids if pad_token_id == END else torch.where(out.attention_mask.bool(), token_ids, pad_token_id)


@functools.cache
def open_clip_tokenize():
    import open_clip

    return open_clip.tokenize


def ours(prompts, pad_token_id=END):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what is cut; tested below
        return Tokenizer(pad_token_id)(prompts)


@pytest.mark.parametrize("prompt", AWKWARD)
def test_token_ids_match_transformers(prompt):
    assert ours([prompt]).tolist() == by_transformers([prompt]).tolist()
    assert ours([prompt], 0).tolist() == by_transformers([prompt], 0).tolist()


@pytest.mark.parametrize("prompt", [*AWKWARD, *REPAIRED.values()])
def test_token_ids_match_open_clip(prompt):
    """open_clip pads with 0, as SD 2.x does."""
    assert ours([prompt], 0).tolist() == open_clip_tokenize()([prompt]).tolist()


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text(max_size=120))
def test_any_text_has_open_clips_token_ids(prompt):
    assert ours([prompt], 0).tolist() == open_clip_tokenize()([prompt]).tolist()


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    st.text(
        alphabet=[chr(c) for c in range(32, 127) if chr(c) not in "<|>&"] + list("äöüßéèçñµ°²αβ中文ж\n\t"), max_size=200
    )
)
def test_ordinary_text_has_transformers_token_ids(prompt):
    assert ours([prompt]).tolist() == by_transformers([prompt]).tolist()


@pytest.mark.parametrize("kind", REPAIRED)
def test_transformers_differs_on_text_that_open_clip_repairs(kind):
    prompt = REPAIRED[kind]
    assert ours([prompt]).tolist() != by_transformers([prompt]).tolist()


@pytest.mark.parametrize(
    "repaired, plain",
    [
        ("the patient\u2019s \u201cright\u201d lung", 'the patient\'s "right" lung'),
        ("in\ufb01ltrate", "infiltrate"),
        ("lung &amp; heart &lt;left&gt;", "lung & heart <left>"),
        ("CHEST   X-ray\n", "chest x-ray"),
    ],
)
def test_cleaning_makes_both_prompts_the_same(repaired, plain):
    assert torch.equal(ours([repaired]), ours([plain]))


def test_golden_ids_of_a_prompt():
    """The ids of "a photo of a cat" in SD 1.5's tokenizer."""
    assert ours(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]


@pytest.mark.parametrize("pad_token_id", [END, 0])
def test_a_row_is_begin_prompt_end_padding(pad_token_id):
    token_ids = ours(["chest x-ray", ""], pad_token_id)
    assert token_ids.shape == (2, 77) and token_ids.dtype == torch.int64
    n = len(Tokenizer().encode("chest x-ray"))
    assert token_ids[0].tolist() == [BEGIN, *Tokenizer().encode("chest x-ray"), END] + [pad_token_id] * (75 - n)
    assert token_ids[1].tolist() == [BEGIN, END] + [pad_token_id] * 75


def test_no_prompts_give_no_rows():
    assert ours([]).shape == (0, 77)


@pytest.mark.parametrize("n, cut", [(74, ""), (75, ""), (76, "word"), (78, "word word word")])
def test_a_prompt_is_cut_at_75_tokens_with_a_warning_that_quotes_the_cut(n, cut):
    prompt = " ".join(["word"] * n)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        token_ids = Tokenizer()([prompt])
    assert token_ids.tolist() == by_transformers([prompt]).tolist()
    assert token_ids[0, -1] == END
    assert Tokenizer().cut(prompt) == cut
    messages = [str(warning.message) for warning in caught]
    assert messages == ([f"the prompt has {n} tokens and only the first 75 are read; cut: {cut!r}"] if cut else [])


def test_the_warning_quotes_exactly_the_words_that_are_lost():
    prompt = "chest x-ray " + "of a lung " * 24 + "no pleural effusion, no pneumothorax"
    with pytest.warns(UserWarning, match="cut: '.*no pleural effusion , no pneumothorax'") as caught:
        Tokenizer()(["short", prompt])
    kept = Tokenizer().encode(prompt)[:75]
    lost = Tokenizer().encode(str(caught[0].message).partition("cut: ")[2].strip("'"))
    assert [*kept, *lost] == Tokenizer().encode(prompt)


def test_importing_the_tokenizer_does_not_import_open_clip():
    """`import open_clip` costs 3 s and needs torchvision."""
    code = (
        "import sys; from minildm.tokenizer import Tokenizer; Tokenizer()(['chest x-ray']); "
        "print([name for name in ('open_clip', 'torchvision', 'transformers', 'timm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_vocabulary_written_for_transformers_is_open_clips(tmp_path):
    peers.write_tokenizer(tmp_path)
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    theirs = {special.get(token, token): i for token, i in _byte_pair_encoder().encoder.items()}
    assert json.loads((tmp_path / "vocab.json").read_text()) == theirs and len(theirs) == 49408


@pytest.mark.parametrize("pad_token_id", [END, 0])
def test_the_files_written_for_transformers_make_its_tokenizer(pad_token_id, tmp_path):
    from transformers import AutoTokenizer

    for name, text in vocabulary_files(pad_token_id).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    made = peers.write_tokenizer(tmp_path / "independent")
    assert json.loads((made / "vocab.json").read_text()) == json.loads((tmp_path / "vocab.json").read_text())
    assert (made / "merges.txt").read_text() == (tmp_path / "merges.txt").read_text()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    prompt = "chest x-ray, 47 year old male"
    ids = theirs(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, Tokenizer(pad_token_id)([prompt]))
