"""From the tokenized text of older benchmarks to text as people write it (GPT-2, section 3.1).

WikiText, PTB and the One Billion Word Benchmark put a space around every sign: `a two @-@ part
episode , he said .` GPT-2 has seldom seen such text. Its paper therefore scores it after
"invertible de-tokenizers", which were not published; the rules below are our own. Each rule
undoes one habit of the corpus's tokenizer, so that the old text can be restored. If that
tokenizer could have met either spelling (a dash between words), the text stays as it is. Nothing
else changes: <unk>, PTB's N and its lower case stay.
"""

import re
from collections.abc import Callable

# Pairs of a pattern and its replacement, as re.sub takes them; applied in order to the whole text.
Rules = tuple[tuple[str, str | Callable[[re.Match], str]], ...]

# The Moses tokenizer, which made WikiText and the One Billion Word Benchmark.
MOSES: Rules = (
    (r'(?<!\S)" ([^"\n]+) "(?!\S)', r'"\1"'),  # in pairs, from the beginning of the line
    (r' ([.,:;!?%]|\.\.\.)(?=[ \n"]|$)', r'\1'),
    (r'(?<=\d): (?=\d)', ':'),  # 22 : 30, which the rule above has left as 22: 30
    (r'([(\[{]) ', r'\1'),
    (r' ([)\]}])', r'\1'),
    (r"(?<=[\w>]) '(?=\w)", "'"),  # Teddy 's, don 't, Chang 'an
    (r"(?<=s) '(?= \w)", "'"),  # the ships ' officers
    (r'([$£€#]) (?=\d)', r'\1'),
    (r'(?<=\d) ([\u2013/]) (?=\d)', r'\1'),  # an en dash, in 2000 - 2005
)
EDGES: Rules = ((r'(?m)^ ', ''), (r'(?m) $', ''))  # each line begins and ends with a space
WIKITEXT: Rules = (
    (r' @([-,.])@ ', r'\1'),  # co @-@ stars, 1 @,@ 050, 16 @.@ 9
    (
        r'(?m)^((?: =)+) (.+?)((?: =)+) $',
        lambda m: f' {m[1].replace(" ", "")} {m[2]} {m[3].replace(" ", "")} ',
    ),
    *MOSES,
    *EDGES,
)
PTB: Rules = (
    (r" n't\b", "n't"),
    (r"(?<=\S) (?='(?:s|re|ve|ll|d|m)\b)", ''),
    (r"(?<=s) '(?= \w)", "'"),
    (r'([$#]) (?=N\b|\d)', r'\1'),
    (r'\\/', '/'),
    *EDGES,
)
RULES: dict[str, Rules] = {'none': (), 'wikitext': WIKITEXT, 'ptb': PTB, '1bw': MOSES}


def make_detokenizer(name: str) -> Callable[[str], str]:
    """The function from the text of a corpus in RULES to natural text; 'none' changes nothing."""
    rules = [(re.compile(pattern), written) for pattern, written in RULES[name]]

    def detokenize(text: str) -> str:
        for pattern, written in rules:
            text = pattern.sub(written, text)
        return text

    return detokenize
