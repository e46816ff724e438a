"""What pytest loads wherever libortho is installed: the fixture `ortho_audit`, and gates.

A package of its own, because to import anything from `libortho` is to import torch and
transformers, with which it registers its quantiser. Nothing here does so before a test asks for an
audit; until then a repository that merely has libortho installed pays a few milliseconds.
"""
