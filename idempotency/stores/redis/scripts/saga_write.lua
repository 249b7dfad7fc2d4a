-- Write entries, phase and result of an owner, and start its lease anew.
-- ARGV: format, id, token, lease (ms), whether there is progress, phase or '', whether there is a result, result, entries
-- Reply: {0} where the token is not the owner's, or {1, wakes}.
if not there or not owned or token ~= ARGV[3] then return {0} end
schedule(now + ARGV[4])
if ARGV[5] == '1' then redis.call('HSET', key, 'c', '0') end
change(6)
return {1, wakes}
