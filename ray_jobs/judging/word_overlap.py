"""How many words an answer shares with its sample answer: all of them, or those that carry content."""

from collections import Counter

from gensim.parsing.preprocessing import STOPWORDS as ENGLISH

GERMAN = frozenset(
    """ab aber alle allem allen aller alles als also am an ander andere anderem anderen anderer anderes auch auf aus bei beim bin bis bist
    da dabei dadurch dafür daher damit dann daran darauf daraus darin darüber das dass davon dazu dein deine dem den denen denn der deren
    des dessen die dies diese diesem diesen dieser dieses doch dort du durch ein eine einem einen einer eines einige einigen er es etwa
    etwas euch euer für ganz gegen gibt hab habe haben hat hatte hatten hier hin hinter ich ihm ihn ihnen ihr ihre ihrem ihren ihrer im
    immer in indem ins ist ja je jede jedem jeden jeder jedes jedoch jene jener kann kein keine keinem keinen keiner können könnte man
    manche mehr mein meine mit muss musste müssen nach nicht nichts noch nun nur ob obwohl oder ohne sehr sein seine seinem seinen seiner
    selbst sich sie sind so sobald sodass solche solcher soll sollen sollte somit sondern sonst sowie über um und uns unser unter viel
    viele vom von vor war waren warum was weder weil weitere welche welchem welchen welcher welches wenn wer werden wie wieder will wir
    wird wo wobei wodurch wollen worden wurde wurden während zu zum zur zwar zwischen""".split()
)
"""German function words: articles, pronouns, prepositions, conjunctions, auxiliaries. No library at hand has a list."""
_STOP_WORDS = {"en": ENGLISH, "de": GERMAN}


def token_f1(answer: list[str], reference: list[str]) -> float:
    """Return the harmonic mean of precision and recall of the answer's words, counted with repetitions.

    Source: SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250), section 6.1.
    """
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def content_words(tokens: list[str], language: str) -> list[str]:
    """Return the words that are no stop words of the language; all words where we have no list for it.

    One letter is content only as a digit: what is left of "isn't" or "z.B." says nothing.

    Args:
        tokens: lower-case words.
        language: "en" (gensim's list) or "de".
    """
    stop_words = _STOP_WORDS.get(language, frozenset())
    return [word for word in tokens if word not in stop_words and (len(word) > 1 or word.isdigit())]
