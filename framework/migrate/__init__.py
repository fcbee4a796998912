"""Commands and files of other trainers as recipes: what each of their settings is here, and what has no counterpart.

No torch; nothing of theirs is imported or run. Their files are read only to count pictures and to copy prompts.
"""

from framework.migrate.convert import Migrated, migrate
from framework.migrate.draft import Note, NoteKind
from framework.migrate.flags import TRAINERS, Row, Table, Trainer, read_table

__all__ = [
    "TRAINERS",
    "Migrated",
    "Note",
    "NoteKind",
    "Row",
    "Table",
    "Trainer",
    "migrate",
    "read_table",
]
