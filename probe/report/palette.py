"""The colours of everything that is drawn or shown: those that the colour-blind can tell apart (Okabe and Ito).

Hexadecimal texts alone, for figures and for pages.
"""

from __future__ import annotations

PREDICTED, MEASURED, DIFFERENCE, TRACKED = "#000000", "#0072B2", "#D55E00", "#009E73"
"""Of what is predicted and measured, of their difference, and of a level that measured changes add up to."""
FALLING, RISING = "#5E3C99", "#E66101"
"""Of what lowers the entropy and of what raises it: the ends of a scale of their own (PuOr of ColorBrewer)."""
NEUTRAL = "#BBBBBB"
"""Of what stands in the background: parts that are no token's, noise floors, other runs."""
INK, FAINT = "#222222", "#666666"
"""Of texts, and of those that may be overlooked."""
ALARM = "#CC79A7"
"""Of alarms, and of the thresholds that they are about."""
CURVES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D1F")
"""Of curves beside each other, taken in turn."""
