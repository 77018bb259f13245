"""Compile every kernel: python -m fastrepa_kernels.aot"""

import sys

from fastrepa_kernels.aot import main

sys.exit(main())
