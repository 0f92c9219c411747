"""Workdirs in object stores, s3:// and gs://: a local folder, mirrored to it during training.

A run writes to its folder as usual, with all the guarantees of a folder (atomic replacement,
appending, locking); new files are uploaded in the background. Whoever reads a run by its address
gets a local copy of what the store has.
"""

from beyond_outliers.stores.copies import Copy as Copy
from beyond_outliers.stores.copies import addresses_below as addresses_below
from beyond_outliers.stores.mirror import mirrored as mirrored
from beyond_outliers.stores.mirror import spool as spool
from beyond_outliers.stores.store import StoreError as StoreError
from beyond_outliers.stores.store import check_address as check_address
from beyond_outliers.stores.store import is_address as is_address
