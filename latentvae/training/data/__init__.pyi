from . import batches as batches
from . import crops as crops
from . import listing as listing
from . import memory as memory
from . import sources as sources
from . import teacher_cache as teacher_cache
