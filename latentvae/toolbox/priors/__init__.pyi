from . import diffusability as diffusability
from . import diffusion as diffusion
from . import latent_set as latent_set
from . import loading as loading
from . import mixture as mixture
from . import prior as prior
from . import sampling as sampling
