"""TeX formulas as MathML, which browsers draw without a script: as much of TeX as the documents use."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape

_LOWER = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho varsigma sigma tau "
    "upsilon phi chi psi omega"
)
_UPPER = "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
LETTERS = {name: chr(0x3B1 + i) for i, name in enumerate(_LOWER.split())}
LETTERS |= dict(zip(_UPPER.split(), "ΓΔΘΛΞΠΣΦΨΩ")) | {"varphi": "φ", "phi": "ϕ", "ell": "ℓ", "infty": "∞"}
SIGNS = {
    "le": "≤",
    "ge": "≥",
    "ll": "≪",
    "gg": "≫",
    "lesssim": "≲",
    "approx": "≈",
    "ne": "≠",
    "sim": "∼",
    "equiv": "≡",
    "preceq": "⪯",
    "succeq": "⪰",
    "subseteq": "⊆",
    "in": "∈",
    "to": "→",
    "mid": "∣",
    "perp": "⊥",
    "propto": "∝",
    "times": "×",
    "cdot": "⋅",
    "circ": "∘",
    "ast": "∗",
    "pm": "±",
    "top": "⊤",
    "dots": "…",
    "ldots": "…",
    "cdots": "⋯",
    "lVert": "‖",
    "rVert": "‖",
    "Vert": "‖",
    "lvert": "|",
    "rvert": "|",
    "langle": "⟨",
    "rangle": "⟩",
    "sum": "∑",
    "prod": "∏",
    "int": "∫",
    "nabla": "∇",
    "partial": "∂",
    "forall": "∀",
    "{": "{",
    "}": "}",
    "|": "‖",
}
FUNCTIONS = (
    "min",
    "max",
    "log",
    "ln",
    "exp",
    "sin",
    "cos",
    "tan",
    "arcsin",
    "arctan",
    "lim",
    "sup",
    "inf",
    "det",
    "Pr",
)
ACCENTS = {"tilde": "~", "widetilde": "~", "hat": "^", "widehat": "^", "bar": "¯", "overline": "¯", "dot": "˙"}
SPACES = {"quad": 1.0, "qquad": 2.0, ",": 0.17, ":": 0.22, ";": 0.28, " ": 0.25, "!": -0.17}
SIZES = ("left", "right", "big", "bigl", "bigr", "Big", "Bigl", "Bigr")
ALPHABETS = {
    "mathbb": (0x1D538, dict(zip("CHNPQRZ", "ℂℍℕℙℚℝℤ"))),
    "mathcal": (0x1D49C, dict(zip("BEFHILMR", "ℬℰℱℋℐℒℳℛ"))),
}
FENCES = "()[]{}|‖⟨⟩"
_FIXED = ' stretchy="false"'
LIMITS = ("\\sum", "\\prod", "\\min", "\\max", "\\lim", "\\sup", "\\inf")
_TOKEN = re.compile(r"\\(?:text|operatorname|mathrm)\{[^{}]*\}|\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\S", re.DOTALL)


def mathml(tex: str, *, display: bool = False) -> str:
    """The formula as a <math> element.

    Raises:
        ValueError: TeX that is not among what the documents use.
    """
    try:
        inside = _Formula(tex, display).row(None)
    except (IndexError, KeyError) as error:
        raise ValueError(f"no MathML for {error} in {tex!r}: add it to docs/mathml.py") from error
    block = ' display="block"' if display else ""
    return f'<math xmlns="http://www.w3.org/1998/Math/MathML"{block}><mrow>{inside}</mrow></math>'


class _Formula:
    """Tokens being read from the left."""

    def __init__(self, tex: str, display: bool) -> None:
        self.tokens, self.display = _TOKEN.findall(tex)[::-1], display

    def row(self, end: str | None) -> str:
        """Everything up to the token `end`, which is taken too."""
        out = ""
        while self.tokens and self.tokens[-1] != end:
            out += self.scripted()
        if end is not None:
            self.tokens.pop()
        return out

    def scripted(self) -> str:
        """An atom with what stands below and above it."""
        first = self.tokens[-1]
        base, below, above = self.atom(), "", ""
        while self.tokens and self.tokens[-1] in "_^'":
            mark = self.tokens.pop()
            if mark == "_":
                below += self.argument()
            else:
                above += "<mo>′</mo>" if mark == "'" else self.argument()
        under = self.display and first in LIMITS
        names = ("munder", "mover", "munderover") if under else ("msub", "msup", "msubsup")
        parts = [f"<mrow>{part}</mrow>" for part in (below, above) if part]
        if not parts:
            return base
        name = names[2] if len(parts) == 2 else names[0] if below else names[1]
        return f"<{name}>{base}{''.join(parts)}</{name}>"

    def atom(self) -> str:
        """One letter, number, sign, group or command with its arguments."""
        token = self.tokens.pop()
        if token == "{":
            return f"<mrow>{self.row('}')}</mrow>"
        if token[0] == "\\":
            return self.command(token[1:])
        if token[0].isdigit() or token.isalpha():
            tag = "mn" if token[0].isdigit() else "mi"
            return f"<{tag}>{token}</{tag}>"
        return _operator("−" if token == "-" else token)

    def argument(self) -> str:
        """An atom, of a number the first digit alone."""
        if (number := self.tokens[-1])[0].isdigit():
            self.tokens[-1:] = [number[1:], number[0]] if len(number) > 1 else [number]
        return self.atom()

    def command(self, name: str) -> str:
        """A command; `name` is without its backslash."""
        word, brace, text = name.partition("{")
        if brace:
            tag, text = "mtext" if word == "text" else "mi", text[:-1].replace(" ", "\u00a0")
            return f"<{tag}>{escape(text)}</{tag}>"
        if name in LETTERS:
            return f"<mi>{LETTERS[name]}</mi>"
        if name in FUNCTIONS:
            return f"<mi>{name}</mi>"
        if name in SPACES:
            return f'<mspace width="{SPACES[name]}em"/>'
        if name in SIZES:
            sign = self.atom()
            return "" if sign == "<mo>.</mo>" else sign.replace(_FIXED, "")
        if name in ACCENTS:
            return f'<mover accent="true">{self.atom()}<mo>{ACCENTS[name]}</mo></mover>'
        if name in ALPHABETS:
            start, others = ALPHABETS[name]
            letters = re.findall(r"[A-Z]", self.atom())
            return f"<mi>{''.join(others.get(letter, chr(start + ord(letter) - 65)) for letter in letters)}</mi>"
        arguments: dict[str, Callable[[], str]] = {
            **dict.fromkeys(("frac", "tfrac", "dfrac"), lambda: f"<mfrac>{self.argument()}{self.argument()}</mfrac>"),
            "sqrt": lambda: f"<msqrt>{self.argument()}</msqrt>",
        }
        return arguments[name]() if name in arguments else _operator(SIGNS[name])


def _operator(sign: str) -> str:
    """A sign. Fences grow with what they enclose only where a command says so."""
    return f"<mo{_FIXED if sign in FENCES else ''}>{escape(sign)}</mo>"
