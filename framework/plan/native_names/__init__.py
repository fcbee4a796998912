"""What other programs call the tensors of a component, and how they are joined there: data, and its interpreter.

`read_component` turns the headers of any file that is known here into published names, without reading a weight: a part
of a fused tensor is a range of the file's bytes.
"""

from __future__ import annotations

from framework.plan.native_names.contents import check_contents
from framework.plan.native_names.translate import read_component

__all__ = ["check_contents", "read_component"]
