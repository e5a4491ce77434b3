"""The acceptance kit: the same cases for every broker, over the HTTP contract. See README.md."""

import pytest

pytest.register_assert_rewrite("acceptance.cases", "acceptance.kit")
