"""What PostgreSQL can do and the stock list does not take for granted: without it, a third of the suite is skipped.

Nothing here depends on the library under test: both runs of a comparison use the same list.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy
from sqlalchemy.testing import exclusions as untyped_exclusions
from sqlalchemy.testing.requirements import SuiteRequirements

exclusions: Any = untyped_exclusions

_ALWAYS = """
    array_type autocommit boolean_col_expressions cast_precision_numerics_many_significant_digits
    check_constraint_reflection column_collation_reflection comment_reflection
    comment_reflection_full_unicode computed_columns computed_columns_reflect_persisted
    computed_columns_stored constraint_comment_reflection cross_schema_fk_reflection ctes ctes_on_dml
    ctes_with_update_delete ctes_with_values date_historic datetime_historic datetime_interval
    datetime_literals datetime_timezone datetime_timezone_historic default_schema_name_switch deferrable_fks
    except_ expression_server_defaults fetch_expression fetch_first fetch_no_order_by
    fetch_offset_with_options fetch_ties fk_constraint_option_reflection_ondelete_noaction
    fk_constraint_option_reflection_ondelete_restrict fk_constraint_option_reflection_onupdate_restrict
    float_or_double_precision_behaves_generically foreign_key_constraint_name_reflection
    foreign_key_constraint_option_reflection_ondelete foreign_key_constraint_option_reflection_onupdate
    has_temp_table identity_columns identity_columns_standard implicit_default_schema index_ddl_if_exists
    index_reflects_included_columns indexes_check_column_order indexes_with_expressions infinity_floats
    inline_check_constraint_reflection intersect isolation_level json_array_indexes json_type
    legacy_unconditional_json_extract materialized_views nullsordering order_by_collation
    percent_schema_names precision_numerics_enotation_small precision_numerics_many_significant_digits
    precision_numerics_retains_significant_digits reflect_indexes_with_expressions reflect_tables_no_columns
    reflects_pk_names regexp_match regexp_replace repeated_column_foreign_keys savepoints
    schema_create_delete server_defaults skip_autocommit_rollback supports_bitwise_and supports_bitwise_not
    supports_bitwise_or supports_bitwise_shift supports_bitwise_xor supports_distinct_on table_ddl_if_exists
    table_value_constructor temp_table_comment_reflection temp_table_names temporary_views time_timezone
    tuple_in tuple_in_w_empty two_phase_transactions unicode_ddl unique_constraints_reflect_as_index
    update_from uuid_data_type view_column_reflection view_reflection views window_functions
"""
_SINCE_2_1 = """
    aggregate_order_by create_or_replace_view create_table_as create_temp_table_as reflect_table_options
    window_range window_range_non_numeric window_range_numeric
"""
_IS_2_0 = sqlalchemy.__version__.startswith("2.0.")


def _only_if(holds: Any, reason: str) -> Any:
    return exclusions.only_if(exclusions.LambdaPredicate(holds, reason))


def _driver_in(*names: str) -> Any:
    return _only_if(lambda config: config.db.url.get_driver_name() in names, f"the driver is {names}")


# SQLAlchemy 2.1 makes computed columns virtual unless told otherwise where the server can (18 and later).
_virtual = _only_if(
    lambda config: not _IS_2_0 and config.db.dialect.server_version_info >= (18,),
    "computed columns are virtual",
)


class PostgreSQL(SuiteRequirements):
    """The suite asks by attribute; where a name is missing here, the stock answer holds."""

    async_dialect = _only_if(lambda config: config.db.dialect.is_async, "an asyncio driver")
    json_deserializer_binary = _driver_in("psycopg", "psycopg_async")
    mod_operator_as_percent_sign = _driver_in("psycopg2")
    computed_columns_virtual = _virtual
    computed_columns_default_persisted = _only_if(
        lambda config: not _virtual.enabled_for_config(config), "computed columns are stored"
    )

    def get_order_by_collation(self, config: Any) -> str:
        return "POSIX"


for _name in f"{_ALWAYS} {'' if _IS_2_0 else _SINCE_2_1}".split():
    setattr(PostgreSQL, _name, exclusions.open())
