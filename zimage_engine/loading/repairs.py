"""The repairs that are made to a folder's files and settings: each row with its reason, in no order.

Repairs of names and shapes inside weight files stand with the layouts they mend (checkpoint/layouts).
"""

from __future__ import annotations

from zimage_engine.checkpoint.repair import Repair

REBUILD_INDEX = Repair(
    "rebuild-shard-index",
    "the index lists which file holds which tensor, and every file's own header says that too",
)
LINK_UNDER_STOCK_NAME = Repair(
    "link-under-stock-name", "the stock loaders look for weights under one name only, whatever a file holds"
)
UNIFY_VARIANTS = Repair(
    "unify-variants", "the stock pipeline takes one variant for all components, and no one is there for all"
)
REWRITE_PICKLE = Repair(
    "rewrite-pickle", "a component in both file forms is read from one of them only, and half is missing then"
)
WRITE_MODEL_INDEX = Repair(
    "write-model-index", "what the components are is told by their own configurations and tensors"
)
COMPLETE_MODEL_INDEX = Repair(
    "complete-model-index", "the stock pipeline loads only what model_index.json lists, class by class"
)
WRITE_CONFIG = Repair(
    "write-config", "the tensors' shapes tell the sizes, and the family the few values that shapes cannot"
)
CORRECT_CONFIG = Repair(
    "correct-config", "a configuration that contradicts the tensors' shapes describes another model"
)
WRITE_SCHEDULER = Repair(
    "write-scheduler-config", "the family was published with this schedule, and draws noise with another"
)
COMPLETE_SCHEDULER = Repair(
    "complete-scheduler-config", "a field left out takes the class's default, which is not the family's"
)
TAKE_FROM_BASE = Repair(
    "take-from-base", "the file does not hold this component; the one named beside it does"
)
UNPACK_FILE = Repair("unpack-single-file", "the stock pipeline loads folders, one for each component")
