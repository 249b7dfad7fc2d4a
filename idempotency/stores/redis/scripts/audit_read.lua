-- Read a part of the audit, the newest first.
-- KEYS[1] stream; ARGV: from which entry on, how many
-- Reply: {now (ms), entries}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
return {now, redis.call('XREVRANGE', KEYS[1], ARGV[1], '-', 'COUNT', ARGV[2])}
