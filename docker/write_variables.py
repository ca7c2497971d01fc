"""Write the table of environment variables into train.sh, between its marks: `python docker/write_variables.py`."""

import re
from pathlib import Path

from acestep_pipeline.container.variables import shell_array

SCRIPT = Path(__file__).with_name("train.sh")


def with_table(text: str) -> str:
    """The script with the present table."""
    return re.sub(r"(?<=# <variables>\n).*?(?=# </variables>)", shell_array(), text, flags=re.DOTALL)


if __name__ == "__main__":
    SCRIPT.write_text(with_table(SCRIPT.read_text(encoding="utf-8")), encoding="utf-8")
