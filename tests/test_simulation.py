"""The deterministic simulation, its own controls, and what it has found."""

from __future__ import annotations
