"""Rare words for DreamBooth's instance prompt."""

import re

import pytest

from minildm.__main__ import main
from minildm.tokenizer import Tokenizer
from minildm.training.rare_tokens import rare_tokens


@pytest.mark.parametrize("max_length", [2, 3, 5])
def test_rare_tokens_survive_tokenization_as_one_token(max_length):
    tokenizer, found = Tokenizer(), rare_tokens(50, max_length)
    without = len(tokenizer.encode("a photo of chest x-ray"))
    assert len(found) == 50
    for word, token_id in found:
        assert re.fullmatch("[a-z]+", word) and len(word) <= max_length
        assert tokenizer.encode(word) == [token_id]
        assert len(tokenizer.encode(f"a photo of {word} chest x-ray")) == without + 1


def test_they_come_rarest_first_and_none_is_left_out():
    ids = [token_id for _, token_id in rare_tokens(10**6, 3)]
    assert ids == sorted(ids, reverse=True) and len(set(ids)) == len(ids)
    tokenizer = Tokenizer()
    assert tokenizer.encode("sks")[0] in ids and tokenizer.encode("the")[0] in ids
    assert min(ids) >= 512  # single bytes are in no order of frequency


def test_the_command_prints_one_line_of_explanation_and_the_words(capsys):
    assert main(["rare-tokens", "-n", "4"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert "single CLIP token" in first and "rarest first" in first
    assert lines == [f"{word}\t{token_id}" for word, token_id in rare_tokens(4)]
