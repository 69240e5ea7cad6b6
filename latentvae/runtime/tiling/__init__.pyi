from . import fitting as fitting
from . import layers as layers
from . import maps as maps
from . import planning as planning
from . import stages as stages
from . import structure as structure
from . import switch as switch
from . import uncompiled as uncompiled
