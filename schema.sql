-- The tables of ftpcoord: psql -f schema.sql, mysql DATABASE < schema.sql, sqlite3 FILE < schema.sql.
-- MySQL and MariaDB run what stands in /*!50600 ... */ and then skip the plain form; the others see comments.
-- token_holder and health_check of the WSO2 Integrator documentation serve as they are: then only file_ledger is new.
-- file_audit is for audit = on.

/*!50600 CREATE TABLE IF NOT EXISTS token_holder (
    group_id VARCHAR(128) CHARACTER SET ascii COLLATE ascii_bin NOT NULL PRIMARY KEY,
    task_id VARCHAR(128) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    term BIGINT NOT NULL DEFAULT 1
) ENGINE=InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_bin */;

CREATE TABLE IF NOT EXISTS token_holder (
    group_id VARCHAR(128) NOT NULL PRIMARY KEY,
    task_id VARCHAR(128) NOT NULL,
    term BIGINT NOT NULL DEFAULT 1
);

/*!50600 CREATE TABLE IF NOT EXISTS health_check (
    task_id VARCHAR(128) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    group_id VARCHAR(128) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    last_heartbeat DATETIME(6) NOT NULL,
    PRIMARY KEY (task_id, group_id)
) ENGINE=InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_bin */;

CREATE TABLE IF NOT EXISTS health_check (
    task_id VARCHAR(128) NOT NULL,
    group_id VARCHAR(128) NOT NULL,
    last_heartbeat TIMESTAMP NOT NULL,
    PRIMARY KEY (task_id, group_id)
);

/*!50600 CREATE TABLE IF NOT EXISTS file_ledger (
    group_id VARCHAR(128) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    file_id CHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    path TEXT NOT NULL,
    size BIGINT NOT NULL,
    mtime VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    state VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    term BIGINT NOT NULL,
    task_id VARCHAR(128) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    attempts INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    next_attempt_at DATETIME(6),
    updated_at DATETIME(6) NOT NULL,
    error TEXT NOT NULL,
    action TEXT NOT NULL,
    PRIMARY KEY (group_id, file_id)
) ENGINE=InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_bin */;

CREATE TABLE IF NOT EXISTS file_ledger (
    group_id VARCHAR(128) NOT NULL,
    file_id CHAR(64) NOT NULL,
    path TEXT NOT NULL,
    size BIGINT NOT NULL,
    mtime VARCHAR(32) NOT NULL,
    state VARCHAR(16) NOT NULL,
    term BIGINT NOT NULL,
    task_id VARCHAR(128) NOT NULL,
    attempts INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    next_attempt_at TIMESTAMP,
    updated_at TIMESTAMP NOT NULL,
    error TEXT NOT NULL,
    action TEXT NOT NULL,
    PRIMARY KEY (group_id, file_id)
);

/*!50600 CREATE TABLE IF NOT EXISTS file_audit (
    group_id VARCHAR(128) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    file_id CHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    at DATETIME(6) NOT NULL,
    path TEXT NOT NULL,
    size BIGINT NOT NULL,
    mtime VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    sha256 VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    outcome VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    term BIGINT NOT NULL,
    task_id VARCHAR(128) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    attempt INTEGER NOT NULL,
    seconds DOUBLE PRECISION,
    error TEXT NOT NULL,
    PRIMARY KEY (group_id, file_id, at, term, attempt, outcome),
    UNIQUE (group_id, at, file_id, term, attempt, outcome),
    UNIQUE (group_id, sha256, file_id, at, term, attempt, outcome)
) ENGINE=InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_bin */;

CREATE TABLE IF NOT EXISTS file_audit (
    group_id VARCHAR(128) NOT NULL,
    file_id CHAR(64) NOT NULL,
    at TIMESTAMP NOT NULL,
    path TEXT NOT NULL,
    size BIGINT NOT NULL,
    mtime VARCHAR(32) NOT NULL,
    sha256 VARCHAR(64) NOT NULL,
    outcome VARCHAR(16) NOT NULL,
    term BIGINT NOT NULL,
    task_id VARCHAR(128) NOT NULL,
    attempt INTEGER NOT NULL,
    seconds DOUBLE PRECISION,
    error TEXT NOT NULL,
    PRIMARY KEY (group_id, file_id, at, term, attempt, outcome),
    UNIQUE (group_id, at, file_id, term, attempt, outcome),
    UNIQUE (group_id, sha256, file_id, at, term, attempt, outcome)
);
