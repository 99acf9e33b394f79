"""Which of a few European languages a text is in, by its commonest little words. No torch.

Enough to see a model leave the language of its prompts; other scripts show by their letters.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W\d_]+")
LEAST_WORDS = 8
"""Words under which a text is in no known language."""
LEAST_SHARE = 0.15
"""Share of its words that are a language's little words, at least; English prose has about 0.4."""

_LITTLE = {
    "english": "the of and to in is that it for was on are as with be at this have from by not you",
    "german": "der die und das ist nicht ein eine zu mit den von auf für sich dem es auch wir sie",
    "french": "le la les et des est une un que pour dans pas qui sur avec ce vous il au du je nous",
    "spanish": "el los las y que en una por con para es un se no del lo como más su al pero muy",
    "italian": "il che di e non per una è sono con del della un si le come anche ma gli nel più",
    "portuguese": "o os as e que não uma em um para com do da é se no na por mais dos ao você",
    "dutch": "de het een en van is dat niet op te zijn met voor die aan er ook maar om als wij",
}
_SETS = {name: frozenset(words.split()) for name, words in _LITTLE.items()}


def language_of(text: str) -> str | None:
    """The language, or None where there is too little to tell, or two are as likely."""
    words = [word.lower() for word in _WORD.findall(text)]
    if len(words) < LEAST_WORDS:
        return None
    counts = sorted(
        ((sum(word in little for word in words), name) for name, little in _SETS.items()),
        reverse=True,
    )
    (first, name), (second, _) = counts[:2]
    clear = first > second and first >= LEAST_SHARE * len(words)
    return name if clear else None
