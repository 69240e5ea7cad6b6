from . import clusters as clusters
from . import encoding as encoding
from . import features as features
from . import gallery as gallery
from . import labels as labels
from . import page as page
from . import projection as projection
from . import scatter as scatter
