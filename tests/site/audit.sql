-- What people ask the audit trail (audit = on) of the group "orders".

-- What came on a day?
SELECT at, path, size, sha256 FROM file_audit
 WHERE group_id = 'orders' AND at >= '2026-01-12' AND at < '2026-01-13' AND outcome = 'done' ORDER BY at;

-- Was this very content here before?
SELECT at, path FROM file_audit WHERE group_id = 'orders' AND sha256 = '6b86b273ff34...' AND outcome = 'done' ORDER BY at;

-- How long do handlers take?
SELECT outcome, COUNT(*), AVG(seconds), MAX(seconds) FROM file_audit
 WHERE group_id = 'orders' AND at >= '2026-01-01' AND outcome IN ('done', 'failed') GROUP BY outcome;
