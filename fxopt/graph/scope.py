"""A graph prepared for matching: positions, aliases, writes and barriers, each computed once and asked cheaply."""

from __future__ import annotations
