"""The verdict on a result: one word, and the reasons for it in sentences."""

from probe.verdict.verdict import verdict
from probe.verdict.words import WORDS, Finding, Verdict, Word

__all__ = ["WORDS", "Finding", "Verdict", "Word", "verdict"]
