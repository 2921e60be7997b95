import sys

from distrl.cli.main import main

sys.exit(main())
