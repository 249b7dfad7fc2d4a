-- Write down an action, or the outcome of one, as an entry of a stream with a bounded length.
-- KEYS[1] stream; ARGV: most entries, then names and values
return redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[1], '*', unpack(ARGV, 2))
