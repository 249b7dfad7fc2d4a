-- Write an entry from outside, unless there is one of its name.
-- ARGV: format, id, entries: one
-- Reply: {0}, or {2, now (ms), 'progress order attempt began changed', body}: those of the entry that is there now.
if not there or ended then return {0} end
if redis.call('HEXISTS', key, 'e' .. ARGV[4]) == 0 then
  record(3)
  call()
end
return {2, now, redis.call('HGET', key, 'e' .. ARGV[4]), redis.call('HGET', key, 'x' .. ARGV[4])}
