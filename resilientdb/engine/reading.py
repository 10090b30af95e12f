"""Inside ``read_only()`` a statement that only reads goes out alone: one round trip instead of three.

BEGIN, the statement and ROLLBACK each wait for an answer. In READ COMMITTED every statement has a snapshot of its
own anyway, so a single SELECT sees without BEGIN what it would have seen after it, and there is nothing to roll
back. To SQLAlchemy nothing is different: its transaction begins, fires its events and ends as always, and the server
does not hear of it. The first statement that is not certain to be a plain read gets the driver's ordinary BEGIN, and
the rest of the block is that transaction.

Certain is what can be read off the text that is sent: it starts as a read, holds no clause that locks or writes, and
calls only functions that are known to write nothing and to mean the same outside a transaction. All other functions
(the user's own, ``nextval``, ``set_config``, ``pg_advisory_xact_lock``) keep their transaction. A view, an operator,
a type or a row-level policy can hide a function from this; see docs/reading.md.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import TwoPhaseTransaction
from sqlalchemy.sql.expression import SelectBase

from resilientdb.engine.compat import record_of
from resilientdb.runtime.context import is_read_only

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from resilientdb.engine.drivers import Driver

__all__ = ["READ_ONLY", "attach", "is_plain_read"]

READ_ONLY: Final = "resilientdb_read_only"
"""The execution option of a connection whose transaction, once there is one at the server, is to be READ ONLY."""


def attach(engine: Engine, driver: Driver) -> None:
    """Let the plain reads of a finished engine go alone, if it is one of PostgreSQL's."""
    # A dialect that speaks PostgreSQL's protocol (CockroachDB) may not mean PostgreSQL's isolation.
    if engine.dialect.name == "postgresql" and not getattr(engine.dialect, "server_side_cursors", False):
        _Reads(engine, driver)


class _Reads:
    """Stands between SQLAlchemy and the dialect's ``do_execute``. Shared by threads without a lock: the two memories
    of verdicts are only ever added to or replaced, and losing one costs a look at the text."""

    def __init__(self, engine: Engine, driver: Driver) -> None:
        self._dialect = dialect = engine.dialect
        self._driver = driver
        self._selects: dict[str, bool] = {}
        self._texts: dict[str, bool] = {}
        self._level_is_set = False
        """Whether a connection was opened with a default isolation level of its own."""
        self._open = dialect.connect
        self._execute = dialect.do_execute
        self._execute_no_params = dialect.do_execute_no_params
        # Not in the events of these names: it would come before the user's listeners, or instead of them.
        dialect.connect = self._connect  # type: ignore[method-assign]
        dialect.do_execute = self._do_execute  # type: ignore[method-assign, assignment]
        dialect.do_execute_no_params = self._do_execute_no_params  # type: ignore[method-assign]

    def _connect(self, *arguments: Any, **parameters: Any) -> Any:
        # dialect.default_isolation_level is what the first connection was told, by whichever node.
        given = " ".join(map(str, (*arguments, *(parameters.get(key) for key in _SESSION_OPTIONS))))
        if "transaction_isolation" in given.replace("-", "_").lower():
            self._level_is_set = True
        return self._open(*arguments, **parameters)

    def _do_execute(self, cursor: Any, statement: Any, parameters: Any, context: Any) -> None:
        if is_read_only() and self._may_go_alone(statement, context):
            self._go_alone(context, self._execute, cursor, statement, parameters, context)
            return
        if READ_ONLY in context.execution_options:
            self._declare(context)
        self._execute(cursor, statement, parameters, context)

    def _do_execute_no_params(self, cursor: Any, statement: Any, context: Any = None) -> None:
        if is_read_only() and context is not None and self._may_go_alone(statement, context):
            self._go_alone(context, self._execute_no_params, cursor, statement, context)
            return
        if context is not None and READ_ONLY in context.execution_options:
            self._declare(context)
        self._execute_no_params(cursor, statement, context)

    def _may_go_alone(self, statement: Any, context: Any) -> bool:
        """Whether the statement itself allows it."""
        compiled = context.compiled
        is_select = compiled is not None and isinstance(compiled.statement, SelectBase)
        known = self._selects if is_select else self._texts
        # The text, not the construct: it is what is sent, after text fragments, hints and the user's listeners.
        if not isinstance(statement, str) or len(statement) > _LONGEST:
            return False
        verdict = known.get(statement)
        if verdict is None:
            verdict = is_plain_read(statement, is_select=is_select)
            if len(known) >= _MOST_VERDICTS:
                known.clear()
            known[statement] = verdict
        # A server-side cursor needs a transaction; the two halves of a two-phase one belong together.
        return (
            verdict
            and not context.execution_options.get("stream_results")
            and not isinstance(context.root_connection.get_transaction(), TwoPhaseTransaction)
        )

    def _go_alone(self, context: Any, execute: Callable[..., None], *arguments: Any) -> None:
        """Without BEGIN, if the state of the connection allows it."""
        connection = context.root_connection.connection.dbapi_connection
        default = None if self._level_is_set else getattr(self._dialect, "default_isolation_level", None)
        if not self._driver.may_withhold_begin(connection, default):
            if READ_ONLY in context.execution_options:
                self._declare(context)
            execute(*arguments)
            return
        try:
            self._driver.withhold_begin(connection)
            try:
                execute(*arguments)
            except Exception as error:
                if not self._driver.is_stale_plan(error):
                    raise
            else:
                return
            # In a transaction the driver would not have prepared it, or would have forgotten it with the ROLLBACK.
            # Nothing was read yet, so that it can be read now.
            _forget_plans(connection)
            execute(*arguments)
        finally:
            self._driver.allow_begin(connection)

    def _declare(self, context: Any) -> None:
        """Begin READ ONLY, if it is this statement that begins. A replica does not need to be told."""
        checked_out = context.root_connection.connection
        connection = checked_out.dbapi_connection
        node = getattr(record_of(checked_out), "node", None)
        if not self._driver.is_idle(connection) or (node is not None and node.role == "replica"):
            return
        cursor = connection.cursor()
        try:
            # Not by the drivers' own attributes: SQLAlchemy sets those back to READ WRITE, which a replica refuses.
            self._driver.begin_with(connection, cursor, "SET TRANSACTION READ ONLY")
        finally:
            cursor.close()


_MOST_VERDICTS: Final = 2000
_LONGEST: Final = 10_000
"""Characters. Longer statements are neither looked at nor remembered: it is not the round trips that they cost."""

_SESSION_OPTIONS: Final = ("options", "server_settings", "dsn", "conninfo")
"""The connect parameters of the drivers that can carry a server setting."""


def _forget_plans(connection: Any) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute("DEALLOCATE ALL")  # the driver hears of it too
    finally:
        cursor.close()


# -- what is a plain read ---------------------------------------------------------------------------------


def is_plain_read(statement: str, *, is_select: bool = False) -> bool:
    """Whether a statement certainly only reads, and means the same outside a transaction.

    ``is_select``: SQLAlchemy made it of a ``Select`` or ``CompoundSelect``, so that it may start with WITH. False
    when in doubt: a literal, a name or a comment that looks like something else is taken for it.
    """
    if _START.match(statement) is None or _SUSPECT.search(statement) is not None:
        return False
    if not is_select and _WITH.search(statement) is not None:
        return False
    return all(_is_harmless(call) for call in _CALL.finditer(statement))


def _is_harmless(call: re.Match[str]) -> bool:
    before, name = (call[1] or "").lower(), call[2].lower()
    if before.startswith("as"):
        return True  # an alias with its columns, a type with its length, a common table expression
    if before.startswith(")") and name in {"over", "filter"}:
        return True
    return name.removeprefix("pg_catalog.") in _HARMLESS


_START: Final = re.compile(r"[\s(]*(?:SELECT|VALUES|SHOW|WITH)\b", re.IGNORECASE | re.ASCII)

# A letter, a digit or $ after a keyword makes another name of it; before it only a letter does, since some servers
# take 1FOR for two words. What comments, dollar quotes and spaced-out names hide is not worth finding out.
_SUSPECT: Final = re.compile(
    r"""; | -- | /\* | \$(?!\d) | "\s*\( | \.\s | \s\.
    | (?<![a-z_]) (?: (?:into|insert|update|delete|merge)(?![\w$]) | for\s+(?:no|key|share)\b )""",
    re.IGNORECASE | re.ASCII | re.VERBOSE,
)
_WITH: Final = re.compile(r"(?<![a-z_])with(?![\w$])", re.IGNORECASE | re.ASCII)

_CALL: Final = re.compile(
    r"""(\bas\s++(?:not\s++)? | \)\s*+)?  (?<![\w$."\x80-\U0010ffff])  ([\w$."\x80-\U0010ffff]++)  \s*+\(""",
    re.IGNORECASE | re.ASCII | re.VERBOSE,
)
"""An opening parenthesis, the name in front of it, and what that name may follow. Linear in the length."""

_SYNTAX: Final = """
    select from as where and or not in exists any all some on by join lateral union intersect except when then
    else case between like ilike limit offset using values array row distinct having group rollup cube cast
    coalesce nullif greatest least interval materialized only symmetric char character varchar varying bit dec
    decimal numeric float time timestamp timetz timestamptz precision current_time current_timestamp localtime
    localtimestamp trim xmlelement xmlforest
"""
"""Words of SQL itself, and types that have a length."""

_AGGREGATES: Final = """
    array_agg avg bit_and bit_or bool_and bool_or corr count covar_pop covar_samp cume_dist dense_rank every
    first_value json_agg json_object_agg jsonb_agg jsonb_object_agg lag last_value lead max min mode nth_value
    ntile percent_rank percentile_cont percentile_disc rank regr_slope regr_intercept regr_r2 row_number stddev
    stddev_pop stddev_samp string_agg sum var_pop var_samp variance xmlagg
"""
"""Over many rows."""

_NUMBERS: Final = """
    abs acos asin atan atan2 cbrt ceil ceiling cos cot degrees div exp factorial floor gcd lcm ln log log10 mod
    pi power radians random round scale sign sin sqrt tan trunc width_bucket int4 int8 float8
"""

_TEXT: Final = """
    ascii btrim char_length character_length chr concat concat_ws convert_from convert_to decode encode format
    initcap left length lower lpad ltrim md5 normalize octet_length overlay parse_ident position quote_ident
    quote_literal quote_nullable regexp_count regexp_like regexp_match regexp_matches regexp_replace
    regexp_split_to_array regexp_split_to_table regexp_substr repeat replace reverse right rpad rtrim sha224
    sha256 sha384 sha512 split_part starts_with string_to_array string_to_table strpos substr substring to_char
    to_hex to_number translate upper text textlike
"""
"""And bytes."""

_TIMES: Final = """
    age clock_timestamp date date_bin date_part date_trunc extract isfinite justify_days justify_hours
    justify_interval make_date make_interval make_time make_timestamp make_timestamptz now overlaps
    statement_timestamp timezone to_date to_timestamp transaction_timestamp
"""
"""Those of the transaction are those of the statement when it goes alone."""

_DOCUMENTS: Final = """
    array_append array_cat array_dims array_fill array_length array_lower array_ndims array_position
    array_positions array_prepend array_remove array_replace array_to_json array_to_string array_upper
    cardinality generate_series generate_subscripts isempty json_array_elements json_array_elements_text
    json_array_length json_build_array json_build_object json_each json_each_text json_extract_path
    json_extract_path_text json_object json_object_keys json_populate_record json_populate_recordset
    json_strip_nulls json_to_record json_to_recordset json_typeof jsonb_array_elements jsonb_array_elements_text
    jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text jsonb_extract_path
    jsonb_extract_path_text jsonb_insert jsonb_object jsonb_object_keys jsonb_path_exists jsonb_path_match
    jsonb_path_query jsonb_path_query_array jsonb_path_query_first jsonb_populate_record
    jsonb_populate_recordset jsonb_pretty jsonb_set jsonb_strip_nulls jsonb_to_record jsonb_to_recordset
    jsonb_typeof lower_inc lower_inf phraseto_tsquery plainto_tsquery range_merge row_to_json setweight to_json
    to_jsonb to_tsquery to_tsvector ts_headline ts_rank ts_rank_cd unnest upper_inc upper_inf
    websearch_to_tsquery int4range int8range numrange daterange tsrange tstzrange
"""
"""Also arrays, ranges and full text."""

_SERVER: Final = """
    gen_random_uuid host network masklen family broadcast col_description current_database current_schema
    current_schemas current_setting format_type has_column_privilege has_schema_privilege has_table_privilege
    inet_server_addr inet_server_port obj_description pg_backend_pid pg_client_encoding pg_column_size
    pg_database_size pg_encoding_to_char pg_function_is_visible pg_get_constraintdef pg_get_expr pg_get_indexdef
    pg_get_serial_sequence pg_get_userbyid pg_get_viewdef pg_indexes_size pg_is_in_recovery
    pg_last_wal_receive_lsn pg_last_wal_replay_lsn pg_last_xact_replay_timestamp pg_postmaster_start_time
    pg_relation_size pg_size_pretty pg_sleep pg_table_is_visible pg_table_size pg_total_relation_size
    pg_type_is_visible pg_typeof pg_wal_lsn_diff to_regclass to_regtype version
"""
"""What it is and has; also identifiers and addresses."""

_HARMLESS: Final = frozenset(
    f"{_SYNTAX} {_AGGREGATES} {_NUMBERS} {_TEXT} {_TIMES} {_DOCUMENTS} {_SERVER}".split()
)
"""Names that may stand before a parenthesis: no function among them writes, locks, or asks for its transaction."""
