"""`python -m fledge.report OUT`"""

from fledge.report import main

raise SystemExit(main())
