"""Workdirs in object stores, s3:// and gs://: a folder here, mirrored to the store while it trains.

A run writes its folder as ever, so that everything that holds of one (replaced whole, appended to,
locked) holds of it; what is new is uploaded in the background. Whoever reads a run by its address
gets a copy of what the store has.
"""

from beyond_outliers.stores.copies import Copy as Copy
from beyond_outliers.stores.copies import addresses_below as addresses_below
from beyond_outliers.stores.mirror import mirrored as mirrored
from beyond_outliers.stores.mirror import spool as spool
from beyond_outliers.stores.store import StoreError as StoreError
from beyond_outliers.stores.store import check_address as check_address
from beyond_outliers.stores.store import is_address as is_address
