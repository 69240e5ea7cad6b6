from . import adapting as adapting
from . import deriving as deriving
from . import layout as layout
from . import programs as programs
from . import stored as stored
from . import writing as writing
