"""The psql script that puts a PostgreSQL server in its lame duck and drains it. ``pg_drain`` has the rules.

It works with PostgreSQL 10 to 18, needs a superuser, and changes nothing in the database: no table, no function, and no
setting that outlives its session. Parameters come as psql variables and environment variables; nothing is pasted in.
"""

from __future__ import annotations

DRAIN_SCRIPT = r"""
\set ON_ERROR_STOP on
SELECT 'vmsnap-drain opened';

-- No setting of the account or the database may cut this session short, redirect a name or freeze what it sees.
SET search_path = pg_catalog, pg_temp;
SET default_transaction_isolation = 'read committed';
SELECT count(set_config(name, '0', false)) FROM pg_settings WHERE name IN
  ('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'idle_session_timeout',
   'transaction_timeout');
SELECT count(set_config(name, value, false)) FROM (VALUES
  ('vmsnap.deadline_s', :'deadline_s'), ('vmsnap.patience_s', :'patience_s'), ('vmsnap.result', '')) AS v (name, value);

DO $check$
BEGIN
  IF pg_is_in_recovery() THEN
    RAISE EXCEPTION 'vmsnap: the server is a standby';
  END IF;
  IF current_setting('is_superuser') <> 'on' THEN
    RAISE EXCEPTION 'vmsnap: % is no superuser', session_user;
  END IF;
END
$check$;

\! "$VMSNAP_PG_CTL" stop -D "$VMSNAP_PGDATA" -m smart -W -s 1>&2

DO $drain$
DECLARE
  deadline_s constant double precision := current_setting('vmsnap.deadline_s');
  patience_s constant double precision := current_setting('vmsnap.patience_s');
  refusal_s constant double precision := 20;  -- for the postmaster to hear the signal
  goodbye_s constant double precision := 10;  -- for sessions that were told to go
  longest_step_s constant double precision := 5;  -- a longer one means that somebody set the clock
  elapsed_s double precision := 0;
  settled_s double precision;
  looked timestamptz := clock_timestamp();
  refuses boolean := false;
  first boolean := true;
  in_flight integer := 0;
  finished integer := 0;
  rolled_back integer := 0;
  work jsonb := '{}';  -- process id -> its work of when the lame duck began, while that lasts
  cut jsonb := '{}';   -- the same, of sessions told to go in mid-work and still there
  here jsonb;          -- process ids of this look
  item jsonb;
  who text;
  stuck boolean;
  newest bigint;
  xid bigint;
  prepared bigint;
  s record;
BEGIN
  LOOP
    IF NOT refuses THEN
      -- The postmaster writes this line in the moment in which it begins to refuse sessions.
      refuses := btrim(split_part(pg_read_file('postmaster.pid'), E'\n', 8)) = 'stopping';
      IF NOT refuses AND elapsed_s > refusal_s THEN
        RAISE EXCEPTION 'vmsnap: the server does not refuse sessions';
      END IF;
    END IF;

    IF refuses THEN
      PERFORM pg_stat_clear_snapshot();
      here := '{}';
      FOR s IN
        SELECT a.pid::text AS pid, a.backend_type = 'walsender' AS sends_wal, v.virtualxid AS vxid,
               a.backend_xid::text AS xid, a.query_start::text AS query_start,
               coalesce(a.state IN ('active', 'fastpath function call'), false) AS executes,
               coalesce(a.wait_event = 'SyncRep', false) AS awaits_standby,
               coalesce(a.wait_event_type = 'Client', false) AS awaits_client,
               a.client_addr IS NULL OR a.client_addr <<= '127.0.0.0/8' OR a.client_addr = '::1' AS near
          FROM pg_stat_activity a
          LEFT JOIN pg_locks v ON v.pid = a.pid AND v.locktype = 'virtualxid' AND v.granted
                              AND v.virtualxid = v.virtualtransaction
         WHERE a.backend_type IN ('client backend', 'walsender') AND a.pid <> pg_backend_pid()
      LOOP
        here := here || jsonb_build_object(s.pid, true);
        CONTINUE WHEN cut ? s.pid;
        IF first AND NOT s.sends_wal AND (s.vxid IS NOT NULL OR s.executes) THEN
          in_flight := in_flight + 1;
          work := work || jsonb_build_object(s.pid, jsonb_build_object(
            'vxid', s.vxid, 'query_start', s.query_start, 'xid', s.xid));
        END IF;
        item := work -> s.pid;
        IF item IS NULL THEN
          -- Idle, a WAL sender, or new work.
          PERFORM pg_terminate_backend(s.pid::integer);
        ELSIF s.awaits_standby OR NOT (
            coalesce(s.vxid = item ->> 'vxid', false)
            -- One statement may hold several transactions: CALL, VACUUM, CREATE INDEX CONCURRENTLY.
            OR s.executes AND coalesce(s.query_start = item ->> 'query_start', false)) THEN
          -- Its work ended, or is committed and waits for a standby that cannot answer. What it does now is new.
          finished := finished + 1;
          work := work - s.pid;
          PERFORM pg_terminate_backend(s.pid::integer);
        ELSE
          stuck := s.awaits_client AND NOT s.near;
          item := jsonb_build_object(
            'vxid', coalesce(s.vxid, item ->> 'vxid'),
            'query_start', item ->> 'query_start',
            'xid', CASE WHEN s.vxid = item ->> 'vxid' THEN coalesce(s.xid, item ->> 'xid') ELSE s.xid END,
            'stuck_since', CASE WHEN stuck THEN coalesce((item ->> 'stuck_since')::double precision, elapsed_s) END);
          work := work || jsonb_build_object(s.pid, item);
          IF elapsed_s >= deadline_s
             OR stuck AND elapsed_s - (item ->> 'stuck_since')::double precision >= patience_s THEN
            work := work - s.pid;
            cut := cut || jsonb_build_object(s.pid, item);
            PERFORM pg_terminate_backend(s.pid::integer);
          END IF;
        END IF;
      END LOOP;
      first := false;

      -- Sessions that went. The commit log knows what became of a transaction that had written.
      FOR who, item IN SELECT key, value FROM jsonb_each(work || cut) WHERE NOT here ? key LOOP
        xid := item ->> 'xid';
        IF xid IS NULL THEN
          stuck := cut ? who OR item ->> 'stuck_since' IS NOT NULL;
        ELSE
          newest := txid_snapshot_xmax(txid_current_snapshot());
          xid := (newest >> 32 << 32) + xid;
          IF xid > newest + 2147483648 THEN
            xid := xid - 4294967296;
          END IF;
          stuck := txid_status(xid) = 'aborted';
        END IF;
        IF stuck THEN
          rolled_back := rolled_back + 1;
        ELSE
          finished := finished + 1;
        END IF;
        work := work - who;
        cut := cut - who;
      END LOOP;

      IF work = '{}' THEN
        settled_s := coalesce(settled_s, elapsed_s);
        EXIT WHEN here = '{}' OR elapsed_s - settled_s > goodbye_s;
      END IF;
    END IF;

    PERFORM pg_sleep(0.1);
    elapsed_s := elapsed_s + least(greatest(extract(epoch FROM clock_timestamp() - looked), 0), longest_step_s);
    looked := clock_timestamp();
  END LOOP;

  -- Sessions that do not go when told to: the stop that follows ends them.
  SELECT rolled_back + count(*) INTO rolled_back FROM jsonb_each(cut);
  SELECT count(*) INTO prepared FROM pg_prepared_xacts;
  PERFORM set_config('vmsnap.result', json_build_object(
    'in_flight', in_flight, 'finished', finished, 'rolled_back', rolled_back, 'prepared', prepared,
    'seconds', round(elapsed_s::numeric, 3))::text, false);
END
$drain$;

SELECT 'vmsnap-drain result ' || current_setting('vmsnap.result');
"""
