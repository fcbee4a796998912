from __future__ import annotations

import subprocess
import sys

from framework.models import get_family
from framework.schema import FAMILIES


def test_every_family_of_the_schema_has_a_class() -> None:
    for name, spec in FAMILIES.items():
        assert get_family(name).spec is spec


def test_the_registry_imports_no_model() -> None:
    code = "import sys, framework.models; assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
