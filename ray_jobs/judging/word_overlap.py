"""How many words an answer shares with its sample answer: all of them, or those that carry content."""

from collections import Counter

ENGLISH = frozenset(
    """a about above across after again all along also although always am among an and another any anyone anything are around as at
    be because been before being below between both but by can could did do does doing done down during each either else enough etc even
    ever every everyone everything few for from further had has have having he hence her here hers herself him himself his how however
    i if in indeed into is it its itself just many may me might mine more moreover most much must my myself of off often on once only onto
    or other others otherwise our ours ourselves out over own perhaps quite rather really same shall she should since so some something
    sometimes still such than that the their theirs them themselves then there thereby therefore these they this those though through
    throughout thus to together too toward towards under unless until up upon us very via was we well were what whatever when whenever
    where whereas whereby wherein whether which while who whoever whom whose why will with within would yet you your yours yourself
    yourselves""".split()
)
"""English function words, of the same kinds as the German ones. Lists made for searching (gensim's, scikit-learn's) also hold
system, computer, call, full, empty, first, last: in a course on operating systems these are what is asked."""
GERMAN = frozenset(
    """ab aber alle allem allen aller alles als also am an ander andere anderem anderen anderer anderes auch auf aus bei beim bin bis bist
    da dabei dadurch dafür daher damit dann daran darauf daraus darin darüber das dass davon dazu dein deine dem den denen denn der deren
    des dessen die dies diese diesem diesen dieser dieses doch dort du durch ein eine einem einen einer eines einige einigen er es etwa
    etwas euch euer für ganz gegen gibt hab habe haben hat hatte hatten hier hin hinter ich ihm ihn ihnen ihr ihre ihrem ihren ihrer im
    immer in indem ins ist ja je jede jedem jeden jeder jedes jedoch jene jener kann können könnte man
    manche mehr mein meine mit muss musste müssen nach noch nun nur ob obwohl oder sehr sein seine seinem seinen seiner
    selbst sich sie sind so sobald sodass solche solcher soll sollen sollte somit sondern sonst sowie über um und uns unser unter viel
    viele vom von vor war waren warum was weil weitere welche welchem welchen welcher welches wenn wer werden wie wieder will wir
    wird wo wobei wodurch wollen worden wurde wurden während zu zum zur zwar zwischen""".split()
)
"""German function words: articles, pronouns, prepositions, conjunctions, auxiliaries; as in English, what denies is content."""
_STOP_WORDS = {"en": ENGLISH, "de": GERMAN}
_DENYING = frozenset("ain aren cannot couldn didn doesn don hadn hasn haven isn shouldn wasn weren wouldn".split())
"""What the apostrophe leaves of an English "n't"; and the one word that has its not inside."""


def token_f1(answer: list[str], reference: list[str]) -> float:
    """Return the harmonic mean of precision and recall of the answer's words, counted with repetitions.

    Source: SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250), section 6.1.
    """
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def content_words(tokens: list[str], language: str) -> list[str]:
    """Return the words that are no stop words of the language; all words where we have no list for it.

    Not, no, nicht, kein are content: they turn a statement round. "isn't" counts as not. Another single letter is content
    only as a digit: what is left of "it's" or "z.B." says nothing.

    Args:
        tokens: lower-case words.
        language: "en" or "de".
    """
    stop_words = _STOP_WORDS.get(language, frozenset())
    if language == "en":
        tokens = ["not" if word in _DENYING else word for word in tokens]
    return [word for word in tokens if word not in stop_words and (len(word) > 1 or word.isdigit())]
