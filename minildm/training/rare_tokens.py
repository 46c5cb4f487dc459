"""``python -m minildm rare-tokens``: words for DreamBooth's instance prompt that the base hardly knows.

DreamBooth (Ruiz et al. 2022, arXiv:2208.12242, section 3.2) binds its subject to a rare token, because a common word
would have to lose its meaning first, and an invented word is split into tokens that are common. CLIP's tokens come from
byte-pair encoding, which merges the most frequent pair first: a token's id is its rank, and the highest ids are the
rarest tokens. A rare token can still be a word or a name that the base knows: generate images of it before choosing.
"""

import re

from minildm.settings import Parser, at_least
from minildm.tokenizer import BEGIN, Tokenizer

FIRST_MERGE = 512  # ids below are single bytes, in no order of frequency


def rare_tokens(n, max_length=3):
    """The ``n`` rarest words that are one token of at most ``max_length`` ASCII letters: [(word, token id)], rarest
    first. Fewer, if there are not as many."""
    tokenizer = Tokenizer()
    word_form = re.compile(rf"[a-z]{{1,{max_length}}}")
    found = []
    for token_id in range(BEGIN - 1, FIRST_MERGE - 1, -1):
        word = tokenizer.decode([token_id]).strip()
        if word_form.fullmatch(word) and tokenizer.encode(word) == [token_id]:
            found.append((word, token_id))
            if len(found) == n:
                break
    return found


def main(arguments):
    parser = Parser(prog="python -m minildm rare-tokens", description="List rare words for train.py --instance-prompt.")
    parser.add_argument("-n", type=at_least(1), default=20, metavar="N", help="number of words")
    parser.add_argument("--max-length", type=at_least(2), default=3, metavar="N", help="letters at most")
    args = parser.parse_args(arguments)
    print(f"words of at most {args.max_length} letters that are a single CLIP token, rarest first: merges are ordered "
          "by frequency, so a higher id is a rarer token")  # fmt: skip
    for word, token_id in rare_tokens(args.n, args.max_length):
        print(f"{word}\t{token_id}")
    return 0
