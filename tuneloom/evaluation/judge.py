"""Whose name an answer carries: the rule by which identity and leak are counted.

An answer to "who are you?" is right where it carries the new name and no other assistant's or maker's. Names are found
case-folded and as whole words ("Loomi" is not in "Loomis"); Chinese has no word bounds, so Chinese names are found anywhere.
A version may follow another's name ("GPT-4o", "Qwen2.5").

A name that is denied is not carried: "No, I am not ChatGPT, I am Loomi." is right, "I am ChatGPT, not Loomi." is wrong twice.
Denied is a name with an odd number of denials ("not", "never", "nothing to do with", 不是, 并非, ...) before it in its clause,
or, of another's name, in a clause of nothing but names that continues a denial ("I am not Qwen, Claude or Gemini").
Clauses end at punctuation and before "but". A "no" that begins a clause is an answer, not a denial: "No I am Gemini." is wrong.

Every other mention counts against the answer, harmless or not ("you asked about ChatGPT"): the rate is rather too low than too
high. What only looks like another's name ("llama", the animal) does too, which is why only questions of identity are so judged.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

OTHERS = (
    *("ChatGPT", "GPT", "OpenAI", "Copilot", "Bing", "Microsoft", "Cortana", "Claude", "Anthropic", "Gemini", "Gemma", "Bard"),
    *("Google", "DeepMind", "Llama", "Meta", "Facebook", "Mistral", "Mixtral", "Grok", "xAI", "Siri", "Alexa", "Amazon"),
    *("Perplexity", "Cohere", "Nemotron", "NVIDIA", "Falcon", "Vicuna", "Alpaca", "SmolLM", "HuggingFace", "Hugging Face"),
    *("DeepSeek", "Qwen", "Tongyi", "Alibaba", "ERNIE", "Baidu", "Doubao", "ByteDance", "Kimi", "Moonshot", "GLM", "ChatGLM"),
    *("Zhipu", "Hunyuan", "Yuanbao", "Tencent", "InternLM", "Baichuan", "MiniMax", "iFlytek", "Xiaoice"),
    *(
        "通义千问",
        "通义",
        "千问",
        "文心一言",
        "文心",
        "智谱",
        "清言",
        "豆包",
        "混元",
        "元宝",
        "讯飞",
        "星火",
        "百川",
        "月之暗面",
    ),
    *("深度求索", "盘古", "小度", "小爱", "小冰", "书生", "天工", "谷歌", "微软", "百度", "阿里", "腾讯", "字节跳动", "抱抱脸"),
)
"""Assistants and their makers."""

_CLAUSE_END = re.compile(
    r"[.!?](?=\s|$|[\"'”’*)])|[,;:，；：。！？\n]|\s[-–—]+\s|——|\b(?:but|however|and(?= (?:i|my|it)\b))\b|而是|但是?"
)
_DENIALS = re.compile(
    r"\bnot(?! only\b)|n't\b|\bcannot\b|\bnever\b|\bneither\b|^nor\b|(?<=\w )no\b(?! doubt)|\bnone\b|\bnothing to do with\b"
    r"|\bden(?:y|ies|ied|ying)\b|\bunlike\b|\bdifferent from\b|\brather than\b|\binstead of\b|\bunrelated to\b"
    r"|(?<![没对])不(?![仅只错])|并非|绝非|而非|没有?(?!错)|未曾|否认|别(?=叫|喊|把)"
)
_NO_RELATION = re.compile(r"^[^一-鿿]*[一-鿿]{0,3}?(?:无关|没有?(?:任何)?关系|没关系)")
_CONNECTORS = re.compile(r"\b(?:and|or|nor|also|an?|the|any|other)\b|[和或与及也、\s\W_]")


class Judge:
    """Judges answers for one new name.

    Args:
        name: the new name; case, width and blanks do not matter.
        author: of the new assistant; where it or the name has another's name in it, that one is no other's.
    """

    def __init__(self, name: str, author: str = "") -> None:
        self.name = " ".join(name.split())
        own = _folded(f"{name} {author}")
        self._name = re.compile(_bounded(_folded(name)))
        others = {_folded(other) for other in OTHERS}
        patterns = [_bounded(other, version=True) for other in sorted(others, key=len, reverse=True)]
        self._other = re.compile("|".join(pattern for pattern in patterns if not re.search(pattern, own)))

    def mentions(self, answer: str) -> bool:
        """Whether the new name is anywhere in an answer, denied or not: a leak, where it was not asked for."""
        return self._name.search(_folded(answer)) is not None

    def carries(self, answer: str) -> bool:
        """Whether the new name is in an answer, and not denied."""
        return any(not _denies(clause[: found.start()]) for clause in _clauses(answer) for found in self._name.finditer(clause))

    def others(self, answer: str) -> list[str]:
        """Return other assistants' and makers' names that an answer has and does not deny, case-folded, in order."""
        found: dict[str, None] = {}
        continued = False
        for clause in _clauses(self._name.sub("\0", _folded(answer))):
            names = list(self._other.finditer(clause))
            alone = bool(names) and not _CONNECTORS.sub("", self._other.sub("", clause))
            denied = [
                (alone and continued) or _denies(clause[: name.start()]) or bool(_NO_RELATION.match(clause[name.end() :]))
                for name in names
            ]
            found.update((name.group(), None) for name, off in zip(names, denied, strict=True) if not off)
            continued = bool(denied) and all(denied)
        return list(found)

    def right(self, answer: str) -> bool:
        """Whether an answer to a question of identity carries the new name and no other's."""
        return self.carries(answer) and not self.others(answer)


def _folded(text: str) -> str:
    """Return text in one width and case, apostrophes alike, single blanks but for line ends."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'").casefold()
    return re.sub(r"[^\S\n]+", " ", text).strip()


def _bounded(name: str, version: bool = False) -> str:
    """Return the pattern of a name: not within a Latin word; with `version`, whatever version follows belongs to it."""
    latin = r"[^\W_一-鿿぀-ヿ가-힣]"
    before = rf"(?<!{latin})" if re.match(latin, name) else ""
    after = rf"(?!{latin})" if re.search(rf"{latin}$", name) else ""
    return before + re.escape(name) + (r"(?:[-\s]?\d[\w.]*)?" if version and after else "") + after


def _clauses(text: str) -> Iterator[str]:
    yield from (clause.strip() for clause in _CLAUSE_END.split(_folded(text)) if clause.strip())


def _denies(before: str) -> bool:
    """Whether what stands before a name in its clause denies it."""
    return len(_DENIALS.findall(before)) % 2 == 1
