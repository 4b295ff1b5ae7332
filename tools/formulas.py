"""Formulas as the docstrings write them, such as `z = (1 − t)·x0 + t·ε`, found in a text and turned into LaTeX."""

import re
import unicodedata
from itertools import pairwise

SYMBOLS = {
    "·": r"\cdot ", "×": r"\times ", "−": "-", "√": r"\surd ", "‖": r"\| ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "~": r"\sim ", "∝": r"\propto ", "→": r"\to ", "←": r"\leftarrow ", "∈": r"\in ",
    "∫": r"\int ", "∂": r"\partial ", "∇": r"\nabla ", "∞": r"\infty ", "½": r"\tfrac12 ", "…": r"\ldots ",
    "<": r"\lt ", ">": r"\gt ", "±": r"\pm ",
}  # fmt: skip
GREEK = {
    "α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "δ": r"\delta", "ε": r"\varepsilon", "η": r"\eta", "λ": r"\lambda",
    "μ": r"\mu", "π": r"\pi", "ρ": r"\rho", "σ": r"\sigma", "τ": r"\tau", "φ": r"\varphi", "Φ": r"\Phi", "Σ": r"\Sigma",
    "Δ": r"\Delta", "θ": r"\theta",
}  # fmt: skip
MARKS = {"\u0302": r"\hat", "\u0304": r"\bar", "\u0307": r"\dot", "\u0303": r"\tilde"}
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀᵗ", "0123456789-Tt")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉ᵢⱼ", "0123456789ij")
FUNCTIONS = {"sin", "cos", "tan", "ln", "log", "exp", "min", "max", "det"}
NAMES = {  # in formulas these stand upright, too
    "found", "kl", "logit", "mean", "model", "noise", "output", "scale", "score", "sech", "sigmoid", "small", "snr",
    "std", "step",
}  # fmt: skip
WORDS = {  # short ones of a text, which are no letters of a formula
    "al", "an", "as", "at", "be", "by", "do", "et", "if", "in", "is", "it", "no", "of", "on", "or", "so", "to", "we",
}  # fmt: skip
OPERATORS = {"=", "+", "−", "·", "×", "/", "≤", "≥", "≠", "<", ">", "→", "←", "~", "∈", "≈", "∝", "±"}
ENDS = re.compile(  # the end of an operand: no operator, opening or function
    r"(?<![=+−·×/≤≥≠<>→←~∈≈∝±,;(\[{])(?<!\b(?:sin|cos|tan|log|exp|min|max))(?<!\bln)(?<!∂_\w)$"
)
BEGINS = re.compile(r"[=+−·×/≤≥≠<>→←~∈≈∝±]")
# What makes a formula:
SYMBOL = re.compile(r"[=·+−√²³^_≤≥∫‖∝∂]|\w/\w|^[Α-Ωα-ω][\u0302-\u0307]?$|^[a-z][\u0302-\u0307]$")
OPENING, CLOSING = "([{", ")]}"


def typeset(text: str) -> str:
    """The text with every formula in it as `\\(…\\)`; whatever is in doubt stays as it is.

    >>> typeset("The straight line z_t = (1 − t)·x0 + t·ε, with t in [0, 1].")
    'The straight line \\\\(z_{t} = (1 - t)\\\\cdot x_{0} + t\\\\cdot \\\\varepsilon \\\\), with t in [0, 1].'
    """
    pieces: list[str] = []
    run = ""
    for token in re.findall(r"\s+|\S+", text):
        if token.isspace():
            run, pieces = (run + token, pieces) if run else ("", [*pieces, token])
        elif _mathematical(token):
            run += token
            if token[-1] in ",;:." and _balanced(run):
                pieces.append(_finished(run))
                run = ""
        else:
            pieces += [_finished(run), token]
            run = ""
    return "".join([*pieces, _finished(run)])


def _mathematical(token: str) -> bool:
    """Whether a word of a text may be part of a formula."""
    plain = re.sub(r"[_^]\(?[−-]?\w+\)?", "", token)
    words = re.findall(r"[A-Za-z]{3,}|[A-Z]{2}", plain)
    known = all(word.lower() in FUNCTIONS | NAMES for word in words)
    return known and not re.search("[-`\"]|'(?!$)|\\w\\w'", plain) and token.strip(",;:.()") not in WORDS


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in OPENING) - (character in CLOSING)
        if depth < 0:
            return False
    return depth == 0


def _finished(run: str) -> str:
    """A run of words with its formulas marked: balanced, of letters and operators, operands at both ends."""
    words = re.findall(r"\S+\s*", run)
    for i, (left, right) in enumerate(pairwise(map(str.strip, words)), start=1):
        if ENDS.search(left) and not BEGINS.match(right):  # two formulas, or a letter that is a word
            return _finished("".join(words[:i])) + _finished("".join(words[i:]))
    if words and words[0].strip() in OPERATORS - {"−"}:
        return words[0] + _finished("".join(words[1:]))
    body = run.strip().rstrip(",;:.")
    if not _balanced(body) and body[0] in OPENING and body.count(body[0]) > body.count(CLOSING[OPENING.index(body[0])]):
        body = body[1:]
    if not _balanced(body) and body[-1] in CLOSING:
        body = body[:-1]
    plain = unicodedata.normalize("NFD", body)
    letter, name = re.search("[A-Za-zΑ-Ωα-ω]", plain), re.fullmatch("[A-Za-z]{2,}_[A-Za-z_]+", body)
    if name or not (letter and SYMBOL.search(plain) and _balanced(body)) or body.split()[-1] in OPERATORS:
        return run
    before, _, after = run.partition(body)
    return f"{before}\\({latex(body)}\\){after}"


def latex(formula: str) -> str:
    """A formula in plain characters as LaTeX.

    >>> latex("σ² = η²·β̃ / √(1 − ᾱ_n)")
    '\\\\sigma ^{2} = \\\\eta ^{2}\\\\cdot \\\\tilde{\\\\beta} / \\\\sqrt{1 - \\\\bar{\\\\alpha}_{n}}'
    """
    return _Reader(unicodedata.normalize("NFD", formula)).all()


class _Reader:
    """Reads a decomposed formula from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.place, self.marked = text, 0, False

    def all(self, end: str = "") -> str:
        """Everything up to `end`, which is read, too."""
        out = ""
        while self.place < len(self.text) and not (end and self._take(re.escape(end))):
            out += self._next()
        return out

    def _take(self, pattern: str) -> str:
        found = re.compile(pattern).match(self.text, self.place)
        self.place += len(found[0]) if found else 0
        return found[0] if found else ""

    def _group(self) -> str:
        """What a root or an exponent covers: what stands in parentheses, or the next atom with its index."""
        for opening, closing in zip(OPENING, CLOSING, strict=True):
            if self._take(re.escape(opening)):
                return self.all(closing)
        sign = "-" if self._take("[−-]") else ""
        return sign + (self._take("[0-9]+") or self._next()) + self._index()

    def _index(self) -> str:
        """The index at this place, if there is one."""
        parts = [self._take("[0-9]+")] if self.text[self.place - 1 : self.place].isalpha() or self.marked else []
        parts.append(self._take("[₀₁₂₃₄₅₆₇₈₉ᵢⱼ]+").translate(LOWERED))
        while self._take("_"):
            word = self._take("[A-Za-z]{2,}")
            parts.append(rf"\mathrm{{{word}}}" if word else self._take("[0-9]+") or self._group())
        index = ",".join(filter(None, parts))
        return f"_{{{index}}}" if index else ""

    def _next(self) -> str:
        self.marked = False
        if self._take("√"):
            return rf"\sqrt{{{self._group()}}}"
        if self._take(r"\^"):
            return f"^{{{self._group()}}}"
        if raised := self._take("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀᵗ]+"):
            return f"^{{{raised.translate(RAISED)}}}"
        if word := self._take("[A-Za-z]{3,}|ln"):
            return (f"\\{word} " if word in FUNCTIONS else rf"\mathrm{{{word}}}") + self._index()
        character = self._take("(?s).")
        out = GREEK.get(character, SYMBOLS.get(character, character))
        for mark in self._take("[\u0302\u0303\u0304\u0307]+"):
            self.marked, out = True, rf"{MARKS[mark]}{{{out}}}"
        index = self._index() if character.isalpha() or character in ")∂" else ""
        return out + index if index or out[-1] == "}" or character not in GREEK else out + " "
