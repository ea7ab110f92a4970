from .main import export_main as export_main
from .main import main as main
