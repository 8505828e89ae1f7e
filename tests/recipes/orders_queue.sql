CREATE TABLE orders_done (path text, size bigint, mtime text, PRIMARY KEY (path, size, mtime));
CREATE TABLE orders (number text, amount text);
