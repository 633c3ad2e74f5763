"""Builds the package; everything but compiled code is declared in pyproject.toml."""

from setuptools import setup

setup()
