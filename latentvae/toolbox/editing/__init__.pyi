from . import fill as fill
from . import interpolate as interpolate
from . import vary as vary
